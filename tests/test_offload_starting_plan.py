"""A plan of one machine as the start of a cache."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, OlmoeConfig

import offload
from offload.starting_plan import read_starting_plan


def write_plan(path, tiers, **changes):
    path.write_text(json.dumps({"format": "expertier.plan", "version": 1, "tier": tiers} | changes))
    return path


def test_experts_in_memory_and_slots(tmp_path):
    plan = read_starting_plan(write_plan(tmp_path / "p.json", [[1, 2, 0, 2], [2, 2, 2, 1]]), [4, 4])
    assert plan.experts_L == ((0, 2), (3,))
    assert plan.slots([10, 100], [1, 2], free_bytes=220) == [2, 2]
    with pytest.raises(ValueError, match="keeps 220 bytes of experts in memory and 219 bytes are left"):
        plan.slots([10, 100], [1, 2], free_bytes=219)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"format": "else"}, "says nothing about tiers"),
        ({"tier": None}, "says nothing about tiers"),
        ({"tier": [[1, 2, 2, 2]]}, "tiers of 1 layers do not fit"),
        ({"tier": [[1, 2, 2], [2, 2, 2, 2]]}, "do not fit"),
        ({"tier": [[1, 2, 2, 7], [2, 2, 2, 2]]}, "must be 0"),
    ],
)
def test_other_files_are_refused(tmp_path, changes, problem):
    path = write_plan(tmp_path / "p.json", [[1, 1, 1, 1]] * 2, **changes)
    with pytest.raises(ValueError, match=problem):
        read_starting_plan(path, [4, 4])


def test_a_model_starts_from_its_plan(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = OlmoeConfig(**sizes, num_key_value_heads=2, num_experts=8, num_experts_per_tok=2, vocab_size=64)
    folder = tmp_path / "model"
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    resident = AutoModelForCausalLM.from_pretrained(folder).eval()
    L, E = resident.config.num_hidden_layers, resident.config.num_experts
    tiers = [[1 if (expert + layer) % 3 == 0 else 2 for expert in range(E)] for layer in range(L)]
    model = offload.load(folder, plan=write_plan(tmp_path / "p.json", tiers))
    expected = [max(row.count(1), resident.config.num_experts_per_tok) for row in tiers]
    assert list(model.offload.num_slots) == expected
    with pytest.raises(ValueError, match="give one of them"):
        offload.load(folder, plan=tmp_path / "p.json", cache_experts=2)
    tokens = torch.arange(3, 9)[None]
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, resident(tokens).logits)
    for slots, row in zip(model.offload._runtime.layers, tiers, strict=True):
        assert len(slots.cache.resident) >= row.count(1)
    report = model.offload.report()
    assert report["hits"] > 0
    assert report["floor_s"] > 0
    model.offload.close()
