"""Replay checkpoints route exactly as recorded, in transformers and offloaded."""

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import offload
from experiments.evidence.replay import ReplaySize, build_replay, check_replay, replay_bytes
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
    assert check_replay(tmp_path, trace, 50) == 1.0
    stored = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    assert abs(stored - replay_bytes(trace, size)) < 0.05 * stored
    tokens = torch.arange(50)[None]
    model = offload.load(tmp_path, cache_experts=3, record_trace=True)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(tmp_path)(tokens).logits
    assert torch.equal(model(tokens).logits, expected)
    assert (model.offload.trace().expert_TLK == trace.expert_TLK).all()


def test_too_many_marks(trace, tmp_path):
    with pytest.raises(ValueError, match="need 32 <= 16"):
        build_replay(trace, tmp_path, ReplaySize(hidden=16, expert=8))
