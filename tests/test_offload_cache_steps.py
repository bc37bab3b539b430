"""Steps on paper find what the runtime finds: the same misses, call by call."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, OlmoeConfig

import offload
from offload.cache.steps import replay_steps
from offload.engine.packing import Piece
from offload.engine.step import ModelSteps
from offload.forecast.steps import StepRates, forecast_steps
from offload.memory.cost import layer_call_seconds
from routing.ground.hardware import Hardware
from routing.traces import RoutingTrace


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of 2 layers of 8 experts, top-2."""
    place = tmp_path_factory.mktemp("model")
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = OlmoeConfig(**sizes, num_key_value_heads=2, num_experts=8, num_experts_per_tok=2, vocab_size=64)
    AutoModelForCausalLM.from_config(config).save_pretrained(place)
    return place


@pytest.mark.parametrize(
    ("slots", "batch", "policy"), [(3, 1, "learned"), (6, 3, "lru"), (6, 3, "learned"), (8, 4, "lfu")]
)
def test_misses_are_those_that_the_runtime_counts(folder, slots, batch, policy):
    model = offload.load(folder, cache_experts=slots, policy=policy, record_trace=True)
    ids_BS = torch.randint(64, (batch, 12), generator=torch.Generator().manual_seed(slots))
    past, counted = None, []
    with torch.inference_mode():
        for step in range(12):
            past = model(ids_BS[:, step : step + 1], past_key_values=past, use_cache=True).past_key_values
            counted.append([layer.misses for layer in model.offload.runtime.counters.layers])
    trace = model.offload.trace()
    model.offload.close()
    row_AT = np.arange(12 * batch).reshape(12, batch)
    found = replay_steps(trace, row_AT, [slots] * 2, policy)
    np.testing.assert_array_equal(found.misses_AL.cumsum(axis=0), counted)
    assert found.rows_ALE.sum() == 12 * batch * 2 * 2
    assert found.after(12).hit_rate == 1


@pytest.mark.parametrize("policy", ["lru", "learned"])
def test_a_piece_of_a_prompt_beside_decoding_misses_what_paper_says(folder, policy):
    """One sequence decodes and two tokens of another's prompt ride along, as the engine packs them into one call."""
    model = offload.load(folder, cache_experts=6, policy=policy, record_trace=True)
    steps, counted = ModelSteps(model), []
    decoding, prompt = steps.empty(), steps.empty()
    for step in range(12):
        ids = [(7 * step + 11 * place) % 64 for place in range(3)]
        steps.run([Piece(cached=decoding, token_ids=ids[:1], by_row=True), Piece(cached=prompt, token_ids=ids[1:])])
        counted.append([layer.misses for layer in model.offload.runtime.counters.layers])
    trace = model.offload.trace()
    model.offload.close()
    found = replay_steps(trace, np.arange(36).reshape(12, 3), [6] * 2, policy)
    np.testing.assert_array_equal(found.misses_AL.cumsum(axis=0), counted)


def test_more_experts_than_slots_pass_in_waves():
    """Six experts through two slots: each is read once a step, and the next step finds what came last."""
    expert_TLK = np.tile(np.array([[0, 1], [2, 3], [4, 5]]), (2, 1))[:, None]
    trace = RoutingTrace(expert_TLK=expert_TLK, sequence_T=np.zeros(6, np.int32), metadata={"num_experts": 6})
    found = replay_steps(trace, np.arange(6).reshape(2, 3), [2], "lru")
    assert found.misses_AL.tolist() == [[6], [4]]
    assert found.hit_rate == pytest.approx(2 / 12)
    with pytest.raises(ValueError, match="num_slots must give 1 layers"):
        replay_steps(trace, np.arange(6).reshape(2, 3), [2, 2], "lru")


@pytest.mark.parametrize(("misses", "seconds"), [(0, 4.0), (1, 6.0), (3, 16.0)])
def test_reads_overlap_with_all_computing_but_the_last(misses, seconds):
    assert layer_call_seconds(misses, 5.0, 4.0, 1.0) == seconds


def test_a_forecast_adds_up_by_hand():
    """One layer of four experts of 1,000 bytes, two rows a step: products at 1,000 B/s, reads at 250 B/s."""
    expert_TLK = np.array([[0, 1], [0, 2], [0, 1], [0, 2]])[:, None]
    trace = RoutingTrace(expert_TLK=expert_TLK, sequence_T=np.zeros(4, np.int32), metadata={"num_experts": 4})
    machine = Hardware(
        disk_bytes_per_s=250, cached_bytes_per_s=1, memory_bytes_per_s=1, exact_bytes_per_s=1000, fast_bytes_per_s=0,
        layer_s=0.5,
    )  # fmt: skip
    fitted = SimpleNamespace(
        plan=SimpleNamespace(num_slots=(3,)),
        forms=[SimpleNamespace(expert_bytes=1000)],
        dense_bytes=600,
        unread_bytes=100,
        streamed_bytes=0,
        kv_token_bytes=20,
    )
    rates = StepRates(machine, {1: 1.0, 2: 1.5}, {2: 0.1})
    row_AT = np.arange(4).reshape(2, 2)
    said = forecast_steps(fitted, trace, row_AT, rates, policy="lru", warm=0)
    computing = 1.5 + 2 * 1.0  # expert 0 has two rows, two others one each
    reading = 3 * (4.0 + 0.25)  # the first step reads three experts, the second none; each takes half a layer's time
    outside = 0.5 * 1.5 + 0.5 + 0.1
    assert said.hit_rate == pytest.approx(0.5)
    assert said.step_s == pytest.approx(outside + (max(reading, computing * 2 / 3) + computing / 3 + computing) / 2)
    with pytest.raises(ValueError, match=r"batches \[2\]; got 1"):
        forecast_steps(fitted, trace, row_AT[:, :1], rates, policy="lru", warm=0)
