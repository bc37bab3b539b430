"""A model's own loop over experts, with fewer slots than the call has experts, while reads ahead are under way."""

import threading

import pytest
import torch
from transformers import AutoModelForCausalLM, OlmoeConfig

import offload
from offload.ram.counters import Counters, LayerCounters
from offload.ram.step import ExpertStep
from offload.store import store


@pytest.fixture
def loaded(tmp_path):
    """A model whose experts' width does not suit `grouped_mm`, with 3 slots of 6 experts."""
    sizes = {"hidden_size": 32, "intermediate_size": 21, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = OlmoeConfig(**sizes, num_key_value_heads=2, num_experts=6, num_experts_per_tok=3, vocab_size=64)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "model")
    loaded = offload.load(tmp_path / "model", cache_experts=3, policy="lru")
    yield loaded, model.model.layers[0].mlp.experts
    loaded.offload.close()


@pytest.mark.parametrize("num_ahead", [1, 3])
def test_a_slot_that_is_being_read_into_is_not_given_away(loaded, num_ahead, monkeypatch):
    model, experts = loaded
    slots, may_read, read_into = model.offload._runtime.layers[0], threading.Event(), store.read_into
    assert not slots.is_grouped
    slots.clear()

    def read_late(*arguments):
        may_read.wait(20)
        read_into(*arguments)

    monkeypatch.setattr(store, "read_into", read_late)
    for expert in range(num_ahead):
        assert slots.read_ahead(expert, (), 3)
    monkeypatch.setattr(store, "read_into", read_into)
    expert_TK = torch.tensor([[0, 1, 2], [3, 4, 5]])
    step = ExpertStep(slots, slots, Counters([LayerCounters()]), dict.fromkeys(range(6), 1), expert_TK)
    step.prepare()
    if num_ahead == 3:
        may_read.set()
    for expert in (5, 4, 3):
        step.fetch(expert)
    weights = step.fetch(3)["gate_up_proj"]
    may_read.set()
    model.offload._runtime.store.quiesce()
    assert torch.equal(weights, experts.gate_up_proj[3])
    for expert in range(6):
        assert torch.equal(step.fetch(expert)["down_proj"], experts.down_proj[expert])
