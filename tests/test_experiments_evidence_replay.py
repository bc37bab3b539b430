"""Replay checkpoints route exactly as recorded, in transformers and offloaded."""

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import offload
from experiments.evidence.replay import FORMS, ReplaySize, build_replay, check_replay, replay_bytes
from routing.traces import RoutingTrace


@pytest.fixture
def trace():
    rng = np.random.default_rng(0)
    expert_TLK = np.stack([[rng.permutation(8)[:3] for _ in range(4)] for _ in range(50)]).astype(np.int16)
    return RoutingTrace(expert_TLK=expert_TLK, sequence_T=np.zeros(50, np.int32), metadata={"num_experts": 8})


def test_routes_as_recorded(trace, tmp_path):
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    size = ReplaySize(hidden=128, expert=64)
    build_replay(trace, tmp_path, size)
    assert check_replay(tmp_path, trace, 1000) == 1.0  # all 50
    stored = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    assert abs(stored - replay_bytes(trace, size)) < 0.05 * stored
    tokens = torch.arange(50)[None]
    model = offload.load(tmp_path, cache_experts=3, record_trace=True)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(tmp_path)(tokens).logits
    assert torch.equal(model(tokens).logits, expected)
    assert (model.offload.trace().expert_TLK == trace.expert_TLK).all()


@pytest.mark.parametrize("form", [form for form in FORMS if form != "plain"])
def test_stored_forms_route_as_recorded_and_are_the_dequantised_model(form, trace, tmp_path):
    size = ReplaySize(hidden=128, expert=64, form=form)
    build_replay(trace, tmp_path / "stored", size)
    assert check_replay(tmp_path / "stored", trace, 50) == 1.0
    if form != "mxfp4":
        stored = sum(file.stat().st_size for file in (tmp_path / "stored").glob("*.safetensors"))
        assert abs(stored - replay_bytes(trace, size)) < 0.1 * stored
    offload.dequantise(tmp_path / "stored", tmp_path / "plain")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tokens = torch.arange(50)[None]
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")(tokens).logits
    model = offload.load(tmp_path / "stored", cache_experts=3, record_trace=True)
    assert torch.equal(model(tokens).logits, expected)
    assert (model.offload.trace().expert_TLK == trace.expert_TLK).all()
    weights = torch.cat([parameter.flatten() for parameter in _experts(tmp_path / "plain")])
    assert 0.3 < float(weights.std()) * 128**0.5 < 3


def _experts(folder):
    from safetensors.torch import load_file

    for file in folder.glob("*.safetensors"):
        yield from (weight for name, weight in load_file(file).items() if ".experts." in name and "bias" not in name)


def test_widths_that_do_not_suit_a_form(trace, tmp_path):
    with pytest.raises(ValueError, match="int4 needs widths that 32 divides, got 128 and 40"):
        build_replay(trace, tmp_path, ReplaySize(hidden=128, expert=40, form="int4"))


def test_too_many_marks(trace, tmp_path):
    with pytest.raises(ValueError, match="need 32 <= 16"):
        build_replay(trace, tmp_path, ReplaySize(hidden=16, expert=8))
