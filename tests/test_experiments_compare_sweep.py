"""Rates: every variant at each of them, the best and the sensitivity by hand, comparisons that take what was found."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from experiments.bench.leverage import mixture_of
from experiments.compare.sweep import plan_sweep, summarised
from experiments.compare.sweep_command import read_rates
from experiments.train.presets import preset
from experiments.train.text.chosen import Text


def test_every_rate_keeps_the_schedules_shape(tmp_path):
    base = preset("smoke")
    runs = plan_sweep(["top2", "rmoe"], [1e-2, 1e-3, 1e-3], base, Text(), tmp_path, seeds=2)
    assert len(runs) == len({run.folder for run in runs}) == 8
    assert {run.config.learning_rate for run in runs} == {1e-2, 1e-3}
    for run in runs:
        assert run.config.min_learning_rate / run.config.learning_rate == pytest.approx(1e-4 / 3e-3)
    assert [run.config.seed for run in runs] == [0] * 4 + [1] * 4, "an interrupted sweep has all rates"
    for rates in ([], [1e-3], [1e-3, -1.0], [1e-3, float("nan")]):
        with pytest.raises(ValueError, match="two or more positive rates"):
            plan_sweep(["top2"], rates, base, Text(), tmp_path, seeds=1)


def test_the_best_rate_and_the_sensitivity_by_hand():
    def run(rate, seed=0):
        config = SimpleNamespace(learning_rate=rate, seed=seed)
        return SimpleNamespace(variant="a", config=config, folder=Path(f"{rate}/{seed}"))

    def finished(bits):
        return {"status": "finished", "held_out_bits_per_byte": bits}

    runs = [run(1.0), run(1.0, 1), run(2.0), run(4.0), run(8.0)]
    results = {
        runs[0].folder: finished(3.0),
        runs[1].folder: finished(5.0),
        runs[2].folder: finished(2.0),
        runs[3].folder: {"status": "diverged", "message": "loss nan"},
        runs[4].folder: {"status": "failed", "message": "no memory"},
    }
    (row,) = summarised(runs, results, start_bits=8.0)["variants"]
    assert (row["best_rate"], row["bits"], row["at_edge"]) == (2.0, 2.0, False)
    assert row["sensitivity"] == pytest.approx(((4.0 - 2.0) + 0.0 + (8.0 - 2.0)) / 3)
    assert row["failed"] == ["rate 8, seed 0: no memory"]
    (row,) = summarised(runs[:2], results, start_bits=8.0)["variants"]
    assert row["at_edge"]
    (row,) = summarised(runs, {}, start_bits=8.0)["variants"]
    assert row["best_rate"] is None


@pytest.mark.slow
def test_a_comparison_takes_the_rates_of_a_sweep_and_warns_without_them(run, tmp_path, capfd):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {n}: {n * n % 97} and {n * 31 % 89}\n" for n in range(900)))
    base = ("--routers", "top2,switch", "--preset", "smoke", "--steps", "2", "--data", text)
    base += ("--set", "precision=float32", "--set", "held_out_tokens=512")
    assert run("sweep", *base, "--rates", "1e-3,1e-2", "--out", tmp_path / "rates") == 0
    shown = capfd.readouterr()
    assert "sensitivity" in shown.out
    assert "try rates beyond it" in " ".join(shown.out.split())
    found = json.loads((tmp_path / "rates/sweep.json").read_text())
    assert {row["variant"] for row in found["variants"]} == {"top2", "switch"}
    rates = read_rates(tmp_path / "rates/sweep.json")

    tuned = ("compare", *base, "--seeds", "1", "--margin", "0.01", "--out", tmp_path / "tuned")
    assert run(*tuned, "--rates", tmp_path / "rates/sweep.json") == 0
    report = json.loads((tmp_path / "tuned/compare.json").read_text())
    assert not any("share one learning rate" in warning for warning in report["warnings"])
    for one in report["runs"]:
        config = json.loads((tmp_path / "tuned/runs" / one["variant"] / "seed_0/compare_config.json").read_text())
        assert config["config"]["learning_rate"] == rates[one["variant"]]
        assert 0 <= one["cloze"] <= 1
        assert one["domains"] == {}
    assert report["margin"] == 0.01
    capfd.readouterr()
    assert run(*tuned, "--margin", "0.5") == 2
    assert "stated before the runs" in capfd.readouterr().err
    assert run(*tuned) == 2
    assert "learning_rate" in capfd.readouterr().err, "other rates are other runs"
    with pytest.raises(ValueError, match="no finished report"):
        read_rates(text)


def test_leverage_of_a_run_is_of_its_sizes(run, capfd):
    assert run("leverage", "--set", "preset=chains") == 0
    said = capfd.readouterr().out
    found = mixture_of(preset("chains"))
    assert found["activation"] == pytest.approx(9 / 33)
    assert found["granularity"] == 4
    assert f"compute {found['compute']:.4g} FLOPs" in said
    assert "step_law: learning rate" in said
    assert "efficiency leverage" in said
    assert run("leverage", "--activation", "0.1") == 2
    assert "or a run: --config run.yaml" in capfd.readouterr().err
