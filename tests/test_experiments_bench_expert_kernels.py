"""The kernel benchmark's part for a GPU, on a small layer in the interpreter: parity gate, failing peers, tuning."""

import functools
import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("triton")

import moe.kernels
from experiments.bench.expert_kernels import bench as bench_kernels
from experiments.bench.expert_kernels import contestants as kernel_contestants
from experiments.bench.expert_kernels import gpu as kernel_gpu
from experiments.bench.expert_kernels import timing as kernel_timing
from experiments.bench.expert_kernels.contestants import Contestant
from experiments.bench.expert_kernels.goals import GOALS, verdicts
from experiments.bench.expert_kernels.measured import ParityError
from experiments.bench.expert_kernels.shapes import LayerShape
from experiments.cli import app
from moe.kernels import fused_experts
from moe.kernels.launching.launch import is_interpreted
from moe.kernels.launching.tiles import ROW_CLASSES, LayerTiles, Tile, row_class
from moe.kernels.launching.tuned import TunedFor, tuned_tiles

SHAPE = LayerShape(width=128, features=128, num_experts=3, top_k=2)
TIMES = kernel_timing.Times(1e-3, 1e-3, 1e-3, 1, is_graph=False)

pytestmark = pytest.mark.skipif(not is_interpreted(), reason="the layer lies where only the interpreter computes")


@pytest.fixture
def layer(monkeypatch):
    monkeypatch.setattr(kernel_gpu, "PARITY_TOKENS", (2,))
    monkeypatch.setattr(kernel_gpu, "QUANTISED_TOKENS", (2,))
    monkeypatch.setattr(kernel_gpu, "QUANTISED_PARITY_TOKENS", (2,))
    return kernel_gpu.GpuLayer("tiny", SHAPE, 1e12, [], device="cpu")


@pytest.fixture
def _no_clock(monkeypatch):
    """Calls are made, but nobody looks at a device's clock and memory."""

    def time_once(call, can_be_captured):
        call()
        return TIMES

    monkeypatch.setattr(kernel_gpu, "time_on_gpu", time_once)
    monkeypatch.setattr(kernel_gpu, "peak_bytes", lambda call: 0)


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
    monkeypatch.setattr(kernel_gpu, "dense_contestants", lambda *_: [right, *others])
    monkeypatch.setattr(kernel_gpu, "QUANTISED_TOKENS", ())
    rows = layer.rows(2, "uniform")
    assert [row["variant"] for row in rows] == ["expertier", "late"]
    assert layer.failed == ["peer, tiny T=2 uniform: no kernel for this shape"]
    bench_kernels._keep(rows, [], [], layer.failed, tmp_path / "kept.json", record=False, has_gpu=True)
    kept = json.loads((tmp_path / "kept.json").read_text())
    assert (kept["failed"], len(kept["rows"])) == (layer.failed, 2)


@pytest.mark.usefixtures("_no_clock")
def test_our_own_failure_ends_the_benchmark(layer, monkeypatch):
    def fails(*_):
        raise RuntimeError("illegal memory access")

    monkeypatch.setattr(kernel_gpu, "dense_contestants", lambda *_: [Contestant("expertier", fails)])
    with pytest.raises(RuntimeError, match="illegal memory access"):
        layer.rows(2, "uniform")


@pytest.fixture
def run(layer, _no_clock, monkeypatch, tmp_path):
    """The whole command as with a GPU, on the small layer; returns its result and what it kept."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(kernel_gpu, "copy_bytes_per_s", lambda: 1e12)
    monkeypatch.setattr(kernel_gpu, "SHAPES", {"tiny": SHAPE})
    monkeypatch.setattr(kernel_gpu, "MANY_TOKENS", (4,))
    monkeypatch.setattr(kernel_gpu, "GpuLayer", functools.partial(kernel_gpu.GpuLayer, device="cpu"))
    # the interpreter compiles nothing
    monkeypatch.setattr(kernel_gpu, "compile_together", lambda launches: None)
    kept = tmp_path / "kept.json"

    def command():
        arguments = ["bench", "kernels", "--tokens", "2", "--tokens", "4", "--routing", "uniform", "--json", str(kept)]
        return CliRunner().invoke(app, arguments), json.loads(kept.read_text()) if kept.exists() else None

    return command


@pytest.mark.slow
def test_the_whole_command_prints_times_of_kernels_that_are_right(run):
    result, kept = run()
    assert result.exit_code == 0, result.output
    assert (kept["not_measured"], kept["failed"]) == ([], [])
    cases = {(row["variant"], row["tokens"], row["pass"]) for row in kept["rows"]}
    assert {("expertier", 2, "forward"), ("expertier", 4, "forward"), ("expertier", 4, "forward+backward")} < cases
    assert {("torch grouped_mm", 4, "forward+backward"), ("transformers grouped_mm", 2, "forward")} < cases
    assert {(f"expertier {name}", 2, "forward") for name in kernel_contestants.QUANTISED} < cases
    assert "p50_us" in result.output


def wrong_output(compute):
    return lambda *given: 1.1 * compute(*given)


def wrong_gradient(compute):
    # the same output, but tokens get twice their gradient
    return lambda experts, x, *given: compute(experts, 2 * x - x.detach(), *given)


@pytest.mark.parametrize("spoil", [wrong_output, wrong_gradient])
def test_no_time_is_printed_when_dense_kernels_are_wrong(run, monkeypatch, spoil):
    monkeypatch.setattr(kernel_contestants, "expertier_experts", spoil(kernel_contestants.expertier_experts))
    result, kept = run()
    assert isinstance(result.exception, ParityError)
    assert "parity is red, so no time is printed: expertier at tiny T=2 uniform" in str(result.exception)
    assert "p50_us" not in result.output
    assert kept is None


def test_no_time_is_printed_when_quantised_kernels_are_wrong(run, monkeypatch):
    monkeypatch.setattr(moe.kernels, "compute_experts", wrong_output(moe.kernels.compute_experts))
    result, kept = run()
    assert isinstance(result.exception, ParityError)
    assert "parity is red, so no time is printed: expertier int8 at tiny T=2 uniform" in str(result.exception)
    assert "p50_us" not in result.output
    assert kept is None


def test_what_was_measured_before_our_own_failure_is_kept(run, monkeypatch):
    timed = kernel_gpu.GpuLayer.func.rows

    def rows(self, num_tokens, *others):
        if num_tokens == 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return timed(self, num_tokens, *others)

    monkeypatch.setattr(kernel_gpu, "QUANTISED_TOKENS", ())
    monkeypatch.setattr(kernel_gpu, "QUANTISED_PARITY_TOKENS", ())
    monkeypatch.setattr(kernel_gpu.GpuLayer.func, "rows", rows)
    result, kept = run()
    assert isinstance(result.exception, torch.OutOfMemoryError)
    assert {row["tokens"] for row in kept["rows"]} == {2}


def test_tuning_covers_every_class_of_rows(layer, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A Device")
    tuned_tiles.cache_clear()
    tile = Tile(16, 32, 16, 4, 1)
    seen = []

    def choose(weights, x_TD, expert_TK, combine_TK):
        seen.append(row_class(expert_TK.numel() / weights.num_slots))
        return LayerTiles(tile, tile, tile, tile, tile)

    monkeypatch.setattr(kernel_gpu, "tune", choose)
    layer.tune()
    assert set(seen) == set(ROW_CLASSES)
    assert set(tuned_tiles("A Device")) == {TunedFor("half", rows, 128, 128) for rows in ROW_CLASSES}
    tuned_tiles.cache_clear()


@pytest.mark.usefixtures("_no_clock")
def test_what_our_kernels_save_is_the_input_the_pre_activation_and_little_else(monkeypatch):
    monkeypatch.setattr(kernel_gpu, "MANY_TOKENS", (8,))
    monkeypatch.setattr(kernel_gpu, "dense_contestants", lambda *_: [Contestant("expertier", fused_experts)])
    narrow = LayerShape(width=48, features=32, num_experts=3, top_k=2)
    forward, both = kernel_gpu.GpuLayer("narrow", narrow, 1e12, [], device="cpu").rows(8, "uniform")
    assert forward["saved_of_least"] is None
    # beside input and pre-activation: combine weights (4 bytes), order and position (8 bytes) per routed row
    routing_bytes = 8 * 2 * 12 + 2 * 4 * (3 + 1)
    least_bytes = 8 * (48 + 2 * 2 * 32) * 2
    assert both["saved_of_least"] == pytest.approx(1 + routing_bytes / least_bytes, abs=1e-3)


def row(shape, tokens, variant="expertier", kind="forward", **found):
    return {"shape": shape, "tokens": tokens, "routing": "uniform", "pass": kind, "variant": variant, **found}


def test_goals_are_judged_by_their_worst_case():
    fast = {"tflops_per_s": 500.0, "of_copy_bandwidth": 0.9, "p50_us": 100.0}
    rows = [
        row("qwen3-30b-a3b", 32768, **fast),
        row("qwen3-30b-a3b", 16384, **fast | {"tflops_per_s": 470.0}),
        row("qwen3-30b-a3b", 16384, "torch grouped_mm", **fast | {"tflops_per_s": 1.0}),
        row("mixtral-8x7b", 32768, **fast | {"tflops_per_s": 560.0}),
        row("olmoe", 1, **fast),
        row("olmoe", 1, "expertier int4", **fast | {"p50_us": 30.0}),
        row("olmoe", 8, **fast | {"of_copy_bandwidth": 0.7}),
        row("olmoe", 4096, kind="forward+backward", saved_of_least=1.004, **fast),
    ]
    by_name = {verdict["goal"]: (verdict["worst"], verdict["verdict"]) for verdict in verdicts(rows)}
    assert len(by_name) == len(GOALS)
    assert by_name["qwen3-30b-a3b, T >= 16384, forward, TFLOP/s"] == (470.0, "missed")
    assert by_name["mixtral-8x7b, T >= 16384, forward, TFLOP/s"] == (560.0, "met")
    assert by_name["fine-grained-7b, T >= 16384, forward, TFLOP/s"] == (None, "unmeasured")
    assert by_name["decode, T = 1..8, share of copy bandwidth"] == (0.7, "missed")
    assert by_name["decode, T = 64, share of copy bandwidth"] == (None, "unmeasured")
    assert by_name["int4 decode against bf16, T = 1, times as fast"] == (3.333, "met")
    assert by_name["saved for backward / (input + pre-activation)"] == (1.004, "met")


def test_goals_come_first_and_parity_before_any_time(monkeypatch):
    monkeypatch.setattr(kernel_gpu, "copy_bytes_per_s", lambda: 1e12)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    names = [
        what for what, _ in kernel_gpu.gpu_work(["olmoe", "small-training"], [1, 512, 16384], None, None, True, [])
    ]
    assert names[:5] == [
        "olmoe tuning", "olmoe compiling", "olmoe parity", "olmoe T=1 uniform", "olmoe T=16384 uniform",
    ]  # fmt: skip
    assert names.index("small-training T=16384 uniform") < names.index("olmoe T=512 uniform")
    assert names.index("small-training parity") < names.index("small-training T=1 uniform")
