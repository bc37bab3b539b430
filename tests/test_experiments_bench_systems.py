"""Benchmarks of whole systems: what they make before they measure."""

import numpy as np
import torch

import offload
from experiments.bench.systems.before_pass import by_row
from experiments.evidence.replay import ReplaySize, build_replay
from offload.prefetch.pass_model import PassModel
from offload.prefetch.predictor import read_predictor
from tests.test_offload_prefetch_pass import following_trace, quickly_fitted


def test_a_predictor_by_row_foresees_of_a_row_what_it_foresaw_of_its_token(tmp_path):
    """And reads ahead in a replay of these rows, whose ids are row numbers, without a change of any bit."""
    trace = following_trace(tokens=180)
    quickly_fitted(trace, 2).save(tmp_path / "pass.npz")
    held = trace.rows(90, 120)
    held.save(tmp_path / "held.npz")
    by_row(tmp_path / "pass.npz", tmp_path / "held.npz", tmp_path / "rows.npz")
    given, mapped = (PassModel.of_arrays(read_predictor(tmp_path / name)) for name in ("pass.npz", "rows.npz"))
    assert np.array_equal(mapped.logits(np.arange(30)[None]), given.logits(held.token_T[None].astype(np.int64)))
    build_replay(held, tmp_path / "replay", ReplaySize(hidden=128, expert=32))
    outputs = []
    for prefetch in ("off", tmp_path / "rows.npz"):
        model = offload.load(tmp_path / "replay", cache_experts=2, prefetch=prefetch)
        with torch.inference_mode():
            outputs.append(torch.cat([model(torch.tensor([[row]])).logits for row in range(8)]))
        model.offload.close()
    assert torch.equal(*outputs)
