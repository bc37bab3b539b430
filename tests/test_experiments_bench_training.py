"""The training benchmark on a tiny model: parity, sizes, what it refuses."""

from dataclasses import replace

import pytest
import torch

from experiments.bench import training as bench_train
from experiments.train.presets import smoke


@pytest.fixture
def tiny():
    config = smoke()
    return replace(config, batch_size=2, sequence_length=16, model=config.model | {"qk_norm": "head"})


def test_both_have_the_same_parameters_but_for_query_and_key_norms(tiny):
    threads = torch.get_num_threads()
    rows = bench_train.measure(tiny, 5, 1, ("float32",))
    assert [row["variant"] for row in rows] == [bench_train.THEIRS, bench_train.OURS]
    assert rows[0]["parameters"] == rows[1]["parameters"]
    assert rows[0]["ratio"] == 1.0
    assert all(row["tokens_per_s_p20"] <= row["tokens_per_s_p50"] <= row["tokens_per_s_p80"] for row in rows)
    assert torch.get_num_threads() == threads


def test_no_time_is_printed_when_the_two_compute_something_else(tiny, monkeypatch):
    monkeypatch.setitem(bench_train.PLAIN, "rope_theta", 500.0)
    bench_train.require_same_function(tiny, "float32")
    as_mixtral = bench_train._as_mixtral

    def wrong(model):
        mixtral = as_mixtral(model)
        mixtral.model.layers[0].mlp.experts.down_proj.data.mul_(1.1)
        return mixtral

    monkeypatch.setattr(bench_train, "_as_mixtral", wrong)
    with pytest.raises(RuntimeError, match="parity is red"):
        bench_train.require_same_function(tiny, "float32")


def test_unknown_precisions_are_refused():
    with pytest.raises(ValueError, match=r"unknown precision 'float8' .*there are bfloat16, float32"):
        bench_train.bench_train(precision=["float8"])
