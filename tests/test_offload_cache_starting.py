"""A plan of one machine as the start of a cache."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, OlmoeConfig

import offload
import placement
from offload.cache.starting import read_starting_plan
from routing.traces import RoutingTrace, lru_hits_LC


def write_plan(path, tiers, **changes):
    """A plan file as `expertier place tiers` writes it."""
    L, E = np.shape(tiers)
    plan = placement.Plan(
        physical_to_logical_LP=np.zeros((L, 1), np.int64),
        num_experts=E,
        cluster=placement.Cluster.grid(1, 1),
        layer_ids=tuple(range(L)),
        hidden_layers=L,
        tier_LE=np.array(tiers),
    )
    path.write_text(json.dumps(plan.to_json() | changes))
    return path


def test_experts_in_memory_and_slots(tmp_path):
    plan = read_starting_plan(write_plan(tmp_path / "p.json", [[1, 2, 0, 2], [2, 2, 2, 1]]), [4, 4])
    assert plan.experts_L == ((0, 2), (3,))
    assert plan.gpu_slots([10, 100], [1, 2], free_bytes=0) is None
    beside = read_starting_plan(tmp_path / "p.json", [4, 4], has_gpu=True)
    assert (beside.experts_L, beside.gpu_L) == (((0,), (3,)), ((2,), ()))
    assert beside.gpu_slots([10, 100], [1, 2], free_bytes=210) == [1, 2]
    assert plan.slots([10, 100], [1, 2], free_bytes=220) == [2, 2]
    with pytest.raises(ValueError, match="keeps 220 bytes of experts in CPU memory and 219 bytes are left"):
        plan.slots([10, 100], [1, 2], free_bytes=219)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"format": "else"}, "not a plan: expected a JSON object with format 'expertier.plan'"),
        ({"version": 9}, "plan version 9 is not supported"),
        ({"tier": None}, "says nothing about tiers; make one with `expertier place tiers`"),
        ({"tier": [[1, 2, 2, 2]]}, "tier_LE must be 2 x 4; got"),
        ({"tier": [[1, 2, 2], [2, 2, 2, 2]]}, "tier must be a rectangular table of integers"),
        ({"tier": [[1, 2, 2, 7], [2, 2, 2, 2]]}, r"must be 0 \(gpu\) or 1 \(cpu\) or 2 \(ssd\); got 1 to 7"),
        ({"tier": [[1, 2, 2, -1], [2, 2, 2, 2]]}, "got -1 to 2"),
    ],
)
def test_other_files_are_refused(tmp_path, changes, problem):
    path = write_plan(tmp_path / "p.json", [[1, 1, 1, 1]] * 2, **changes)
    with pytest.raises(ValueError, match=problem):
        read_starting_plan(path, [4, 4])


@pytest.mark.parametrize("experts_L", [[4], [4, 4, 4], [8, 8], [4, 8]])
def test_plans_of_other_models_are_refused(tmp_path, experts_L):
    path = write_plan(tmp_path / "p.json", [[1, 1, 1, 1]] * 2)
    with pytest.raises(ValueError, match="tiers of 2 layers of 4 experts do not fit the model's"):
        read_starting_plan(path, experts_L)


def test_what_is_no_plan_file_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no such file; make one with `expertier place tiers`"):
        read_starting_plan(tmp_path / "absent.json", [4])
    (tmp_path / "p.json").write_text("{")
    with pytest.raises(ValueError, match=r"plan .*p\.json: "):
        read_starting_plan(tmp_path / "p.json", [4])
    monkeypatch.setattr("offload.cache.starting.MOST_BYTES", 0)
    with pytest.raises(ValueError, match="larger than 0 bytes, so not a plan of one machine"):
        read_starting_plan(tmp_path / "p.json", [4])


def test_a_plan_is_read_without_torch(tmp_path):
    path = write_plan(tmp_path / "p.json", [[1, 2, 0, 2]])
    program = (
        "import sys; sys.modules.update(dict.fromkeys(['torch', 'transformers'])); "
        "from offload.cache.starting import read_starting_plan; "
        f"assert read_starting_plan({str(path)!r}, [4]).experts_L == ((0, 2),)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def narrow_and_wide(tmp_path):
    """Layer 0 alternates between two pairs of experts, layer 1 goes through all eight, layer 2 keeps one pair."""
    row_T = np.arange(200)
    layers = [row_T % 2 * 2, row_T % 4 * 2, np.zeros(200, int)]
    expert_TLK = np.stack([np.stack([first, first + 1], axis=1) for first in layers], axis=1)
    trace = RoutingTrace(expert_TLK=expert_TLK, sequence_T=np.zeros(200, np.int32), metadata={"num_experts": 8})
    trace.save(tmp_path / "t.npz")
    return tmp_path / "t.npz"


def test_slots_go_to_the_layers_where_a_trace_would_have_hit_more(tmp_path):
    """Fourteen slots: 4, 8 and 2 hold everything, one less in layer 1 loses all of its hits."""
    path = narrow_and_wide(tmp_path)
    plan = read_starting_plan(path, [8, 8, 8])
    assert plan.experts_L == ((), (), ())
    assert plan.slots([10, 10, 10], [2, 2, 2], free_bytes=149) == [4, 8, 2]
    assert plan.slots([10, 10, 10], [2, 2, 2], free_bytes=1000) == [8, 8, 8]
    assert plan.slots([10, 10, 20], [2, 2, 2], free_bytes=95) == [3, 2, 2]
    hits_LC = lru_hits_LC(RoutingTrace.load(path))
    even, spread = [5, 5, 4], plan.slots([10, 10, 10], [2, 2, 2], free_bytes=140)
    assert sum(hits_LC[range(3), spread]) > sum(hits_LC[range(3), even])
    with pytest.raises(ValueError, match="fewer than the 6 that the layers need"):
        plan.slots([10, 10, 10], [2, 2, 2], free_bytes=59)


@pytest.mark.parametrize("experts_L", [[8, 8], [4, 4, 4]])
def test_traces_of_other_models_are_refused(tmp_path, experts_L):
    with pytest.raises(ValueError, match="3 layers of 8 experts do not fit the model's"):
        read_starting_plan(narrow_and_wide(tmp_path), experts_L)


@pytest.fixture
def folder(tmp_path):
    """A model of 3 layers of 8 experts, top-2."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = OlmoeConfig(**sizes, num_key_value_heads=2, num_experts=8, num_experts_per_tok=2, vocab_size=64)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_model_starts_from_its_plan(tmp_path, folder):
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


def test_a_model_gets_its_slots_from_a_trace(tmp_path, folder):
    resident, tokens = AutoModelForCausalLM.from_pretrained(folder).eval(), torch.arange(3, 9)[None]
    model = offload.load(folder, plan=narrow_and_wide(tmp_path))
    assert list(model.offload.num_slots) == [8, 8, 8]
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, resident(tokens).logits)
    model.offload.close()
