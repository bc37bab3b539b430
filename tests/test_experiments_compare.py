"""`expertier compare`: metrics by hand and brute force, what a run survives, what is refused."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

import experiments.train.torch_run as train_module
from experiments.compare.command import _all_fitting
from experiments.compare.compare import SHOWN, compare, print_table
from experiments.compare.engines import execute
from experiments.compare.measures.choices import (
    mutual_information,
    router_metrics,
    segment_routing_performance,
    sharpness,
    trace_of,
)
from experiments.compare.measures.flops import Usage, parameters, router_flops, token_flops
from experiments.compare.page import TABLES, write_page
from experiments.compare.runs import Text, execute_one, plan_runs
from experiments.compare.summary import METRICS, cell, summarise
from experiments.train.corpus import load_corpus
from experiments.train.presets import preset
from experiments.train.torch_run import train
from experiments.variants.catalogue import VARIANTS, model_overrides
from moe import MoEConfig, MoEForCausalLM
from routing import ROUTERS, RouterStats, Routing, RoutingTrace


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("read") / "text.txt"
    path.write_text("".join(f"line {n}: {n * n % 97} and {n * 31 % 89}\n" for n in range(1500)))
    return str(path)


@pytest.fixture(scope="module")
def tiny():
    """Three layers, so that pre-gating three ahead does not fit and two does."""
    base = preset("smoke")
    model = base.model | {"num_hidden_layers": 3, "hidden_size": 32, "head_dim": 16, "moe_intermediate_size": 16}
    return replace(
        base, model=model, steps=4, batch_size=2, sequence_length=32, warmup_steps=1, evaluate_every=2,
        checkpoint_every=2, held_out_tokens=256, precision="float32",
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(tiny, text, tmp_path_factory):
    """A comparison of one variant with one seed, and its report."""
    out = tmp_path_factory.mktemp("finished")
    return out, compare(["top2"], tiny, out, seeds=1, data=text, quiet=True)


@pytest.fixture
def out(finished, tmp_path):
    """A copy of the finished comparison."""
    return Path(shutil.copytree(finished[0], tmp_path / "out"))


def stats_of(probability_TR, expert_TK, num_experts):
    probability_TR, expert_TK = torch.tensor(probability_TR), torch.tensor(expert_TK)
    routing = Routing(
        expert_TK=expert_TK,
        weight_TK=torch.zeros(expert_TK.shape),
        num_experts=num_experts,
        num_zero_compute=probability_TR.shape[1] - num_experts,
    )
    return RouterStats(probability_TR=probability_TR, chosen=routing, kept=routing)


# --- metrics --------------------------------------------------------------------------------------------------------


def test_sharpness_by_hand():
    layer = stats_of([[0.6, 0.3, 0.1], [0.5, 0.1, 0.4], [0.8, 0.1, 0.1]], [[0], [0], [0]], 3)
    found = sharpness([[layer]], top_k=2)
    assert found["inner_balance"] == pytest.approx(2.0)
    assert found["outer_balance"] == pytest.approx((0.9 + 0.9 + 0.9) / 3)


def test_mutual_information_is_that_of_first_choices():
    def one_hot(*choices):
        return stats_of(np.eye(2, dtype=np.float32)[list(choices)].tolist(), [[c] for c in choices], 2)

    copied = [[one_hot(0, 1, 0, 1), one_hot(1, 0, 1, 0)]]
    unrelated = [[one_hot(0, 0, 1, 1), one_hot(0, 1, 0, 1)]]
    assert mutual_information(copied) == pytest.approx(math.log(2))
    assert mutual_information(unrelated) == pytest.approx(0.0)


def test_segment_routing_performance_equals_brute_force():
    generator = np.random.default_rng(0)
    expert_TLK = generator.integers(-1, 4, (24, 2, 2)).astype(np.int16)
    expert_TLK[:, :, 1] = np.where(expert_TLK[:, :, 1] == expert_TLK[:, :, 0], -1, expert_TLK[:, :, 1])
    sequence_T = np.repeat(np.arange(2, dtype=np.int32), 12)
    trace = RoutingTrace(expert_TLK=expert_TLK, sequence_T=sequence_T, metadata={"num_experts": 4})
    m, per_layer = 5, []
    for layer in range(2):
        uses = []
        for sequence, start in product((0, 1), range(12 - m + 1)):
            rows = expert_TLK[sequence * 12 + start : sequence * 12 + start + m, layer]
            uses += [sum(e in row for row in rows.tolist()) for e in range(4)]
        scores = []
        for threshold in range(1, m + 1):
            kept = [f for f in uses if f >= threshold]
            precision = sum(kept) / (m * len(kept)) if kept else 0
            recall = sum(kept) / sum(uses)
            scores.append(2 * precision * recall / (precision + recall) if kept else 0)
        per_layer.append(max(scores))
    assert segment_routing_performance(trace, m) == pytest.approx(np.mean(per_layer))


def test_trace_keeps_ffn_experts_only():
    layer = stats_of([[0.25] * 4] * 2, [[0, 3], [2, 4]], 2)  # E = 2: 2 and 3 are zero-compute, 4 is empty
    trace = trace_of([[layer, layer]], (1, 2), 2, source="test")
    assert trace.expert_TLK[:, 0].tolist() == [[0, -1], [-1, -1]]


def test_flops_by_hand(tiny_config):
    """D 32, 4 heads and 2 key heads of 8, F 24, E 6, 3 layers, V 96; S = 9 sees 5 positions on average."""
    sizes = {"num_shared_experts": 1, "num_dense_layers": 1, "zero_compute_experts": ["copy", "constant"]}
    model = MoEForCausalLM(tiny_config(router="mixtral", **sizes))
    load_R = torch.tensor([0.25] * 6 + [0.5, 0.25])
    usage = Usage(loads=[load_R, load_R], router_passes=[1.0, 1.0])
    flops = token_flops(model, usage, sequence_length=9)
    assert flops.attention == 3 * (2 * 32 * (32 + 16 + 16 + 32) + 4 * 32 * 5)
    assert flops.experts == 2 * 1.5 * 6 * 32 * 24
    assert flops.shared == 2 * 6 * 32 * 24 + 6 * 32 * 48
    assert flops.zero_compute == 2 * (0.5 * 64 + 0.25 * (128 + 128))
    assert flops.router == 2 * 2 * 8 * 32
    assert flops.head == 2 * 32 * 96
    assert flops.total == sum(
        (flops.attention, flops.experts, flops.shared, flops.zero_compute, flops.router, flops.head)
    )


def test_shared_recurrent_cell_is_passed_in_every_layer_and_owned_once(tiny_config):
    model = MoEForCausalLM(tiny_config(router="rmoe", router_options={"state_width": 8}))
    assert router_flops(model) == 3 * 2 * (8 * 32 + 6 * 8 + 6 * 8 * 8)
    experts = 3 * 6 * 3 * 32 * 24
    count = parameters(model, true_load=2.0)
    assert count["total"] - count["active"] == experts * 4 / 6
    assert count["router"] == 3 * (8 * 32 + 6 * 8) + 6 * 8 * 8 + 6 * 8


def test_pre_gated_layers_are_foreseen_exactly(tiny, text):
    corpus = load_corpus(text)
    scores = {}
    for name in ("top2", "pregate-1", "expert-choice", "remoe"):
        scores[name] = router_metrics(_model(name, tiny), corpus, sequence_length=32, max_tokens=256, batch_size=4)
        assert set(METRICS) - {"held_out_bits_per_byte", "tokens_per_second", "cloze", "copying"} <= set(scores[name])
        assert all(math.isfinite(value) for value in scores[name].values())
    assert scores["pregate-1"]["predictability"] == 1.0
    assert scores["top2"]["predictability"] < 1.0
    assert scores["expert-choice"]["max_vio"] == 0.0


def _model(name, tiny):
    settings = {"vocab_size": 256, "initializer_range": 0.3} | model_overrides(name, tiny.model)
    return MoEForCausalLM(MoEConfig(**settings)).eval()


def results_of(values, variant="a"):
    return [
        {"variant": variant, "seed": seed, "status": "finished", **dict.fromkeys(METRICS, value)}
        for seed, value in enumerate(values)
    ]


def test_summary_has_mean_and_spread_over_finished_seeds():
    diverged = {"variant": "b", "seed": 0, "status": "diverged", "message": "loss nan"}
    a, b = summarise([*results_of((1.0, 3.0)), diverged])
    assert a["metrics"]["true_load"] == {"mean": 2.0, "spread": math.sqrt(2), "values": [1.0, 3.0]}
    assert cell(a, "true_load") == "2.00 ± 1.41"
    assert (b["status"], b["seeds"], cell(b, "true_load")) == ("seed 0 diverged", 0, "-")
    assert b["troubles"] == ["seed 0 diverged: loss nan"]


def test_the_report_is_in_the_units_of_the_runs_and_the_table_in_millions():
    (row,) = summarise(results_of((107_968.0, 114_000.0)))
    assert row["metrics"]["parameters"]["mean"] == 110_984
    assert cell(row, "parameters") == "0.111 ± 0.004"


@pytest.mark.parametrize("width", [60, 80, 400])
def test_tables_fit_the_terminal_and_cut_nothing(width, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(width))
    diverged = {"variant": "b", "seed": 0, "status": "diverged", "message": "loss nan"}
    print_table(summarise([*results_of((1.25, 3.5), "adamoe-1.5-per-null"), *results_of((1.25, 3.5)), diverged]))
    printed = capsys.readouterr().out
    assert "…" not in printed
    assert max(map(len, printed.splitlines())) <= width
    assert printed.count("adamoe-1.5-per-null") == printed.count("variant")
    assert all(METRICS[name].label in printed for name in SHOWN)
    assert "b, seed 0 diverged: loss nan" in printed


def test_the_page_survives_one_step_one_seed_and_equal_values(tmp_path):
    rows = summarise(results_of((2.0,)) + results_of((2.0,), "b"))
    for curves in ({"a": [[(1, 5.0)]], "b": [[]]}, {"a": [[(5, 5.0), (10, 4.0)], [(5, 6.0)]]}, {}):
        write_page(tmp_path / "page.html", rows, curves, {"text": "facts <&>"})
        page = (tmp_path / "page.html").read_text()
        assert page.count("<svg") == 2 + bool(curves)
        assert "facts &lt;&amp;&gt;" in page


def test_differences_are_paired_by_seed_and_judged_by_their_interval():
    """Two seeds that differ by 1 agree on a gap of 0.10 and 0.12: t(0.975, 1) = 12.706, so +- 12.706 * 0.01."""

    def runs(variant, values):
        return [
            {"variant": variant, "seed": seed, "status": "finished", **dict.fromkeys(METRICS, value)}
            for seed, value in values.items()
        ]

    first = runs("a", {0: 2.0, 1: 3.0})
    rows = summarise([*first, *runs("b", {0: 2.10, 1: 3.12}), *runs("c", {1: 2.5, 7: 9.0}), *runs("d", {5: 1.0})])
    found = rows[1]["difference"]
    assert found["mean"] == pytest.approx(0.11)
    assert (found["low"], found["high"]) == pytest.approx((0.11 - 0.12706, 0.11 + 0.12706), abs=1e-4)
    assert found["verdict"] == "no difference shown"
    assert rows[0]["difference"] is None
    assert rows[2]["difference"] == {
        "mean": -0.5,
        "low": None,
        "high": None,
        "seeds": 1,
        "effect": None,
        "equivalence": None,
        "verdict": "one seed: no verdict",
    }
    assert rows[3]["difference"] is None, "no common seed"
    many = {seed: 2.0 + seed for seed in range(4)}
    for gap, verdict in ((0.1, "worse"), (-0.1, "better")):
        own = runs("b", {seed: value + gap + 0.001 * (seed % 2) for seed, value in many.items()})
        assert summarise([*runs("a", many), *own])[1]["difference"]["verdict"] == verdict


@pytest.mark.slow
def test_every_metric_is_in_one_table_of_the_page_and_says_how_it_was_made(tiny, text, out):
    assert sorted(name for names in TABLES.values() for name in names) == sorted(METRICS)
    compare(["top2", "loss-free"], tiny, out, seeds=2, data=text, quiet=True)
    page = (out / "compare.html").read_text()
    for said in (
        "learning rate 0.003 to 0.0001",
        "precision float32",
        "0, 1; ±",
        "called from Python",
        "machine",
        "expertier",
    ):
        assert said in page
    assert "against top2, 95 %" in page
    assert page.count("bits/byte ↓") >= 2


# --- runs -----------------------------------------------------------------------------------------------------------


def test_a_diverging_run_is_reported_and_does_not_sink_the_others(tiny, text, tmp_path):
    runs = plan_runs(["top2", "adamoe-1.5"], tiny, 1, Text(data=text), tmp_path / "out")
    runs[0] = replace(runs[0], config=replace(runs[0].config, learning_rate=1e30, clip_norm=1e30))
    ended = {}
    execute(runs, 1, lambda run, result: ended.setdefault(run.variant, result))
    assert ended["top2"]["status"] == "diverged"
    assert "diverged at step" in ended["top2"]["message"]
    assert ended["adamoe-1.5"]["status"] == "finished"


def test_report_and_continuation(tiny, text, out):
    first = (out / "runs/top2/seed_0/compare_result.json").stat().st_mtime_ns
    report = compare(["top2", "pregate-2"], tiny, out, seeds=1, data=text, quiet=True)
    assert (out / "runs/top2/seed_0/compare_result.json").stat().st_mtime_ns == first, "not run again"
    assert [row["variant"] for row in report["variants"]] == ["top2", "pregate-2"]
    assert json.loads((out / "compare.json").read_text())["variants"] == report["variants"]
    page = (out / "compare.html").read_text()
    assert page.count("<svg") == 3
    assert "pregate-2" in page
    assert "src=" not in page
    assert "@import" not in page
    with pytest.raises(ValueError, match="other settings"):
        compare(["top2"], replace(tiny, steps=5), out, seeds=1, data=text, quiet=True)


def test_a_checkpoint_of_another_run_is_not_continued(tiny, text, tmp_path):
    (run,) = plan_runs(["top2"], tiny, 1, Text(data=text), tmp_path / "out")
    train(replace(run.config, steps=2), load_corpus(text), run.folder, quiet=True)
    result = execute_one(run, threads=None)
    assert result["status"] == "failed"
    assert "other settings" in result["message"]


def test_a_run_that_failed_is_tried_again(tiny, text, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as broken:
        broken.setattr(train_module, "build", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
        report = compare(["top2"], tiny, out, seeds=1, data=text, quiet=True)
    assert report["variants"][0]["troubles"] == ["seed 0 failed: OSError: no space left"]
    assert "no space left" in (out / "compare.html").read_text()
    report = compare(["top2"], tiny, out, seeds=1, data=text, quiet=True)
    assert report["variants"][0]["status"] == ""


def test_a_kill_between_the_last_checkpoint_and_the_result_changes_nothing(finished, tiny, text, out):
    whole = finished[1]
    (out / "runs/top2/seed_0/compare_result.json").unlink()
    again = compare(["top2"], tiny, out, seeds=1, data=text, quiet=True)
    for one, other in zip(whole["runs"], again["runs"], strict=True):
        assert one | {"seconds": 0} == other | {"seconds": 0}


@pytest.mark.parametrize("name", ["compare_result.json", "compare_config.json"])
def test_a_damaged_file_is_named(name, tiny, text, out):
    path = out / "runs/top2/seed_0" / name
    path.write_text(path.read_text()[:40])
    with pytest.raises(ValueError, match=rf"{name} is damaged .*; remove .*seed_0 to run it anew"):
        compare(["top2"], tiny, out, seeds=1, data=text, quiet=True)


def test_a_damaged_checkpoint_sinks_one_run_only(tiny, text, tmp_path):
    out = tmp_path / "out"
    (run, _) = plan_runs(["top2", "loss-free"], tiny, 1, Text(data=text), out)
    train(run.config, load_corpus(text), run.folder, quiet=True)
    for weights in run.folder.glob("checkpoints/*/model.safetensors"):
        weights.write_bytes(weights.read_bytes()[:100])
    report = compare(["top2", "loss-free"], tiny, out, seeds=1, data=text, quiet=True)
    assert [row["status"] for row in report["variants"]] == ["seed 0 failed", ""]


def test_seeds_on_different_texts_are_not_mixed(tiny, text, out, tmp_path):
    other = Path(shutil.copy(text, tmp_path / "other.txt"))
    renamed = compare(["top2"], tiny, out, seeds=1, data=str(other), quiet=True)
    assert renamed["variants"][0]["seeds"] == 1, "the same text by another name"
    other.write_text(other.read_text()[::-1])
    with pytest.raises(ValueError, match="was begun on another text"):
        compare(["top2"], tiny, out, seeds=2, data=str(other), quiet=True)


@pytest.mark.parametrize("content", [None, "", "ab", "too short for a sequence of 64"])
def test_bad_text_is_refused_before_anything_starts(content, tiny, tmp_path):
    path = tmp_path / "t.txt"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=r"no such file|too few|fewer than one sequence"):
        compare(["top2"], replace(tiny, sequence_length=64), tmp_path / "out", seeds=1, data=str(path), quiet=True)
    assert not (tmp_path / "out").exists()


def test_the_command_says_what_went_wrong(text, tmp_path, run, capfd):
    common = ("compare", "--preset", "smoke", "--steps", "1", "--seeds", "1", "--data", text)
    assert run(*common, "--routers", "forced", "--out", tmp_path / "a") == 2
    printed = capfd.readouterr()
    assert "forced: the router 'forced' replays a recorded routing" in printed.err
    assert run(*common, "--routers", "top2", "--out", tmp_path / "b", "--json", tmp_path / "none" / "x.json") == 2
    assert "does not exist; create it first" in capfd.readouterr().err
    assert not (tmp_path / "b").exists()
    assert run(*common, "--routers", "top2", "--out", text) == 2
    assert "this command reads it" in capfd.readouterr().err


def test_all_are_those_that_fit_the_preset(capsys):
    names = _all_fitting(preset("smoke"))
    assert set(VARIANTS) - set(names) == {"pregate-2", "pregate-3"}
    assert "left out: pregate-2: ahead must lie in 0..1" in capsys.readouterr().err


def command_of(out, text, processes, steps):
    return [
        sys.executable, "-m", "experiments.cli", "compare", "--routers", "top2,rmoe", "--preset", "smoke",
        "--steps", str(steps), "--seeds", "1", "--data", text, "--out", str(out), "--processes", processes,
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("processes", ["1", "2"])
def test_killed_comparison_continues_where_it_was(processes, text, tmp_path):
    out = tmp_path / "out"
    command = command_of(out, text, processes, steps=80)
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    checkpoint = out / "runs/top2/seed_0/checkpoints/step_00000020"
    while not checkpoint.exists() and process.poll() is None:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "runs/top2/seed_0/compare_result.json").exists()
    subprocess.run(command, check=True, capture_output=True)
    report = json.loads((out / "compare.json").read_text())
    assert {run["status"] for run in report["runs"]} == {"finished"}
    lines = (out / "runs/top2/seed_0/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 81))


@pytest.mark.slow
@pytest.mark.parametrize("processes", ["1", "2"])
def test_ctrl_c_saves_every_run_and_the_same_command_continues(processes, text, tmp_path):
    out = tmp_path / "out"
    command = command_of(out, text, processes, steps=200)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    begun = [out / f"runs/{name}/seed_0/checkpoints/step_00000020" for name in ("top2", "rmoe")[: int(processes)]]
    while not all(path.exists() for path in begun) and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command continues" in errors
    assert "expertier: interrupted" in errors
    assert "Traceback" not in errors
    subprocess.run(command, check=True, capture_output=True)
    report = json.loads((out / "compare.json").read_text())
    assert {run["status"] for run in report["runs"]} == {"finished"}


# --- variants and bad input -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_fits_its_preset(name, tmp_path):
    (run,) = plan_runs([name], preset("routers"), 1, Text(), tmp_path)
    assert run.config.model["router"] in ROUTERS
    assert run.config.seed == 0


def test_adamoe_variants_aim_at_the_load_in_their_name():
    for name, load in (("adamoe-2.0", 2.0), ("adamoe-1.5", 1.5), ("adamoe-1.5-per-null", 1.5)):
        model = model_overrides(name, preset("routers").model)
        nulls = len(model["zero_compute_experts"])
        assert 16 * model["num_experts_per_tok"] / (16 + nulls) == load


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["top3"], "did you mean 'top2'"),
        (["top2", "top2"], "named twice"),
        (["pregate-3"], r"pregate-3: ahead must lie in 0\.\.2"),
        (["base"], "base: base assigns exactly 1"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_starts(names, message, tiny, text, tmp_path):
    with pytest.raises(ValueError, match=message):
        compare(names, tiny, tmp_path / "out", seeds=1, data=text, quiet=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_architectures_are_compared_with_or_without_routers(tiny, text, tmp_path):
    base = replace(tiny, model=tiny.model | {"num_hidden_layers": 4}, steps=2, held_out_tokens=128)
    names = ["chain-2", "chain-2-shared-gate", "dense", "mor-expert-2", "mor-token-2", "mor-expert-2-moe"]
    report = compare(names, base, tmp_path / "out", seeds=1, data=text, quiet=True)
    rows = {row["variant"]: row for row in report["variants"]}
    assert not any(row["status"] for row in rows.values())
    assert set(rows["chain-2"]["metrics"]) == set(METRICS)
    assert "max_vio" not in rows["dense"]["metrics"]
    assert cell(rows["dense"], "max_vio") == "-"
    flops = {name: row["metrics"]["flops_per_token"]["mean"] for name, row in rows.items()}
    assert flops["mor-token-2"] < flops["dense"] * 1.1
    assert rows["mor-expert-2"]["metrics"]["parameters"]["mean"] < rows["dense"]["metrics"]["parameters"]["mean"]
    assert rows["chain-2"]["metrics"]["true_load"]["mean"] == 2
    assert (tmp_path / "out/compare.html").is_file()


def test_presets_that_do_not_fit_an_architecture_are_refused(tiny, text, tmp_path):
    with pytest.raises(ValueError, match="3 recursions must divide the 1 layers"):
        plan_runs(["mor-expert-3"], tiny, 1, Text(), tmp_path)
    with pytest.raises(ValueError, match="did you mean 'chain-2'"):
        plan_runs(["chain-3"], tiny, 1, Text(), tmp_path)
