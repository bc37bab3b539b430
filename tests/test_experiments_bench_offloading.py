"""The offloading benchmark: its parity gate, its contestants on a small replay, and its memory limit."""

import json

import numpy as np
import pytest

from experiments.bench.offloading import bench as bench_offload
from experiments.bench.offloading import llama_cpp
from experiments.bench.offloading.catalogue import CONTESTANTS
from experiments.bench.offloading.contestants import contest, load_model
from experiments.evidence import memory_limit
from experiments.evidence.replay import ReplaySize, build_replay
from offload.cache.catalogue import CACHES, NEEDS_FUTURE, NEEDS_PREDICTOR
from routing.traces import RoutingTrace


@pytest.fixture
def checkpoint(tmp_path):
    rng = np.random.default_rng(0)
    expert_TLK = np.stack([[rng.permutation(8)[:2] for _ in range(3)] for _ in range(30)]).astype(np.int16)
    trace = RoutingTrace(expert_TLK=expert_TLK, sequence_T=np.zeros(30, np.int32), metadata={"num_experts": 8})
    build_replay(trace, tmp_path, ReplaySize(hidden=128, expert=64))
    return tmp_path


@pytest.mark.parametrize("form", ["plain", "mxfp4"])
def test_parity_gate(form):
    bench_offload.check_parity(form)


def test_who_cannot_read_codes_is_refused_before_anything_runs(tmp_path):
    with pytest.raises(ValueError, match="resident cannot read experts as fp8; ours, ours-fast, ours-lru can"):
        bench_offload.bench_offload(tmp_path, form="fp8", contestant=["resident"])
    with pytest.raises(ValueError, match="unknown form 'fp4'"):
        bench_offload.bench_offload(tmp_path, form="fp4")


def test_a_folder_of_another_form_is_refused(checkpoint):
    with pytest.raises(ValueError, match="has experts as plain, not as int4"):
        bench_offload.bench_offload(checkpoint, form="int4", contestant=["ours"])


def test_contestants_agree(checkpoint):
    measured = {
        name: contest(name, checkpoint, "none", prefill=8, decode=6) for name in ("ours", "ours-lru", "resident")
    }
    assert measured["ours"]["logits"] == measured["ours-lru"]["logits"] == measured["resident"]["logits"]
    assert len(measured["ours"]["step_s"]) == 6
    assert 0 < measured["ours"]["hit_rate"] <= 1
    with pytest.raises(ValueError, match="unknown contestant"):
        contest("theirs", checkpoint, "none", 2, 2)


def test_a_failing_program_is_reported(tmp_path):
    finished = memory_limit.run_limited(["sh", "-c", "echo hello; exit 3"], None, 10)
    assert (finished.returncode, finished.stdout, finished.peak_bytes) == (3, "hello\n", None)


def test_dropping_cached_pages_keeps_the_files(tmp_path):
    (tmp_path / "a").write_text(json.dumps([1]))
    memory_limit.drop_cached(tmp_path)
    assert (tmp_path / "a").read_text() == "[1]"


@pytest.mark.skipif(not llama_cpp.is_available(), reason=llama_cpp.NOT_INSTALLED)
def test_llama_cpp_computes_the_same_model(checkpoint):
    import torch

    file = llama_cpp.gguf_of(checkpoint)
    engine = llama_cpp.LlamaCpp(file, 32, 1)
    with torch.inference_mode():
        expected = load_model("resident", checkpoint, "none", 32).float()(torch.arange(20)[None]).logits[0]
    for ids in (list(range(12)), [12], [13], list(range(14, 20))):
        found = torch.from_numpy(engine(ids))
        torch.testing.assert_close(found, expected[ids[-1]], rtol=0, atol=0.02 * float(expected.abs().max()))
    assert llama_cpp.gguf_of(checkpoint) == file
    with pytest.raises(OSError, match="cannot load"):
        llama_cpp.LlamaCpp(checkpoint / "config.json", 32, 1)


def test_an_unknown_contestant_is_refused_before_anything_runs(tmp_path):
    with pytest.raises(ValueError, match=r"unknown contestant 'theirs'; there are accelerate, llama\.cpp, ours"):
        bench_offload.bench_offload(tmp_path, contestant=["theirs"])


def test_a_misspelt_contestant_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"'ours-lrru' \(did you mean 'ours-lru'\?\)"):
        bench_offload.bench_offload(tmp_path, contestant=["ours-lrru"])


def test_prefetching_contestants_need_a_predictor_before_anything_runs(tmp_path):
    with pytest.raises(ValueError, match="ours-compressed-ahead needs --predictor"):
        bench_offload.bench_offload(tmp_path, contestant=["ours", "ours-compressed-ahead"])


def test_every_policy_that_can_run_is_a_contestant():
    policies = {row.arguments["policy"] for row in CONTESTANTS.values() if "policy" in row.arguments}
    assert policies == set(CACHES) - NEEDS_FUTURE - NEEDS_PREDICTOR


def test_who_runs_at_which_limit():
    runs = {name: (row.runs_under("4GiB"), row.runs_under("none")) for name, row in CONTESTANTS.items()}
    assert {name for name, both in runs.items() if both != (True, True)} == {"accelerate", "resident"}
    assert (runs["accelerate"], runs["resident"]) == ((True, False), (False, True))


def test_without_llama_cpp_its_row_says_so(checkpoint, monkeypatch):
    monkeypatch.setattr(llama_cpp, "is_available", lambda: False)
    row = bench_offload._run("llama.cpp", checkpoint, "none", 4, 2, None)
    assert row["tok_per_s"] is None
    assert "not installed" in row["note"]
