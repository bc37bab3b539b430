"""The kernel benchmark's part for a GPU, on a small layer in the interpreter: parity gate, failing peers, tuning."""

import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from experiments import bench_kernels, kernel_contestants, kernel_timing
from experiments.kernel_contestants import Contestant
from experiments.kernel_shapes import LayerShape
from moe.kernels import tune as tuner
from moe.kernels.launch import is_interpreted
from moe.kernels.tiles import ROW_CLASSES, LayerTiles, Tile, row_class, tuned_tiles

SHAPE = LayerShape(width=128, features=128, num_experts=3, top_k=2)
TIMES = kernel_timing.Times(1e-3, 1e-3, 1e-3, 1, is_graph=False)

pytestmark = pytest.mark.skipif(not is_interpreted(), reason="the layer lies where only the interpreter computes")


@pytest.fixture
def layer(monkeypatch):
    monkeypatch.setattr(bench_kernels, "PARITY_TOKENS", (2,))
    monkeypatch.setattr(bench_kernels, "QUANTISED_TOKENS", (2,))
    monkeypatch.setattr(bench_kernels, "QUANTISED_PARITY_TOKENS", (2,))
    return bench_kernels._GpuLayer("tiny", SHAPE, 1e12, [], device="cpu")


@pytest.fixture
def _no_clock(monkeypatch):
    """Calls are made, but nobody looks at a device's clock and memory."""

    def time_once(call):
        call()
        return TIMES

    monkeypatch.setattr(kernel_timing, "time_on_gpu", time_once)
    monkeypatch.setattr(kernel_timing, "peak_bytes", lambda call: 0)


def test_dense_and_quantised_kernels_pass_the_parity_gate(layer):
    assert [one.name for one in layer.quantised] == [f"expertier {name}" for name in kernel_contestants.QUANTISED]
    assert layer.parity_rows() == []


@pytest.mark.parametrize("name", ["int4", "fp8_block"])
def test_parity_is_red_when_quantised_kernels_compute_something_else(layer, name):
    right = kernel_contestants.quantised_contestant(layer.experts, name)
    layer._quantised = [replace(right, compute=lambda *given: 1.1 * right.compute(*given))]
    with pytest.raises(RuntimeError, match=f"parity is red, so no time is printed: expertier {name} at tiny T=2"):
        layer.parity_rows()


def test_quantised_kernels_are_judged_by_their_own_weights(layer):
    one = next(one for one in layer.quantised if one.name == "expertier int4")
    given = layer.given(2, "uniform")
    dense = kernel_contestants.truth(layer.experts, given)
    own = kernel_contestants.truth(layer.experts, given, one.weights)
    bound = kernel_contestants.BOUNDS[torch.bfloat16]
    assert kernel_contestants.worst_error(one, layer.experts, given, own) < bound
    assert kernel_contestants.worst_error(one, layer.experts, given, dense) > 2 * bound


@pytest.mark.usefixtures("_no_clock")
def test_a_failing_peer_is_listed_and_the_others_are_timed(layer, monkeypatch, tmp_path):
    def fails(*_):
        raise RuntimeError("no kernel for this shape\nand a long trace")

    right = kernel_contestants.dense_contestants(4, 1.0, 2)[0]
    others = [Contestant("peer", fails), Contestant("late", right.compute)]
    monkeypatch.setattr(kernel_contestants, "dense_contestants", lambda *_: [right, *others])
    monkeypatch.setattr(bench_kernels, "QUANTISED_TOKENS", ())
    rows = layer.rows(2, "uniform")
    assert [row["variant"] for row in rows] == ["expertier", "late"]
    assert layer.failed == ["peer, tiny T=2 uniform: no kernel for this shape"]
    bench_kernels._keep(rows, [], layer.failed, tmp_path / "kept.json", record=False, has_gpu=True)
    kept = json.loads((tmp_path / "kept.json").read_text())
    assert (kept["failed"], len(kept["rows"])) == (layer.failed, 2)


@pytest.mark.usefixtures("_no_clock")
def test_our_own_failure_ends_the_benchmark(layer, monkeypatch):
    def fails(*_):
        raise RuntimeError("illegal memory access")

    monkeypatch.setattr(kernel_contestants, "dense_contestants", lambda *_: [Contestant("expertier", fails)])
    with pytest.raises(RuntimeError, match="illegal memory access"):
        layer.rows(2, "uniform")


def test_tuning_covers_every_class_of_rows(layer, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A Device")
    tuned_tiles.cache_clear()
    tile = Tile(16, 32, 16, 4, 1)
    seen = []

    def choose(weights, x_TD, expert_TK, combine_TK):
        seen.append(row_class(expert_TK.numel() / weights.num_slots))
        return LayerTiles(tile, tile, tile, tile, tile)

    monkeypatch.setattr(tuner, "tune", choose)
    layer.tune()
    assert set(seen) == set(ROW_CLASSES)
    assert set(tuned_tiles("A Device")) == {("half", rows) for rows in ROW_CLASSES}
    tuned_tiles.cache_clear()
