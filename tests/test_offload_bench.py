"""The offloading benchmark: its parity gate, its contestants on a small replay, and its memory limit."""

import json

import numpy as np
import pytest

from experiments import bench_offload, memory_limit
from experiments.replay import ReplaySize, build_replay
from routing.traces import RoutingTrace


@pytest.fixture
def checkpoint(tmp_path):
    rng = np.random.default_rng(0)
    expert_TLK = np.stack([[rng.permutation(8)[:2] for _ in range(3)] for _ in range(30)]).astype(np.int16)
    trace = RoutingTrace(expert_TLK=expert_TLK, sequence_T=np.zeros(30, np.int32), metadata={"num_experts": 8})
    build_replay(trace, tmp_path, ReplaySize(hidden=128, expert=64))
    return tmp_path


def test_parity_gate():
    bench_offload.check_parity()


def test_contestants_agree(checkpoint):
    measured = {
        name: bench_offload._contest(name, checkpoint, "none", prefill=8, decode=6)
        for name in ("ours", "ours-lru", "resident")
    }
    assert measured["ours"]["logits"] == measured["ours-lru"]["logits"] == measured["resident"]["logits"]
    assert len(measured["ours"]["step_s"]) == 6
    assert 0 < measured["ours"]["hit_rate"] <= 1
    with pytest.raises(ValueError, match="unknown contestant"):
        bench_offload._contest("theirs", checkpoint, "none", 2, 2)


def test_a_failing_program_is_reported(tmp_path):
    finished = memory_limit.run_limited(["sh", "-c", "echo hello; exit 3"], None, 10)
    assert (finished.returncode, finished.stdout, finished.peak_bytes) == (3, "hello\n", None)


def test_dropping_cached_pages_keeps_the_files(tmp_path):
    (tmp_path / "a").write_text(json.dumps([1]))
    memory_limit.drop_cached(tmp_path)
    assert (tmp_path / "a").read_text() == "[1]"
