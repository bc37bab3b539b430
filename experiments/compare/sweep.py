"""Sweep: variants trained at several learning rates each; the best rate of each, and how much a wrong one costs."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from routing.ground.files import write_json
from routing.ground.terminal import plain_console

from ..train.description.config import TrainConfig
from ..train.metrics import without_nan
from ..train.presets import with_rate
from ..train.text.chosen import Text
from .engines import execute
from .runs import Run, plan_runs
from .summary import JUDGED

AROUND = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Multiples of a base's rate that are tried if none are given: a factor of two tells rates apart at a few seeds."""
SWEEP_FILE = "sweep.json"


def sweep(
    variants: Sequence[str],
    rates: Sequence[float],
    base: TrainConfig,
    text: Text,
    out: Path,
    *,
    seeds: int = 1,
    processes: int = 1,
    engine: str = "local",
    quiet: bool = False,
) -> dict[str, Any]:
    """Run what is missing and report on everything; safe to kill and call again.

    Args:
        variants: names, as for `compare`.
        rates: peak rates, 2 or more; the last rate of a schedule keeps its share of each.
        base: what all runs share.
        text: what they read.
        out: folder of the sweep.
        seeds: runs per variant and rate.
        processes: runs at a time.
        engine: who executes them, a key of `engines.ENGINES`.
        quiet: no progress bar.

    Returns:
        The report, which is also `<out>/sweep.json`; see `summarised`.

    Raises:
        ValueError: as `compare`, or if there are fewer than two rates or one that is not positive.
    """
    runs = plan_sweep(list(variants), rates, base, text, out, seeds)
    corpus = text.load()
    start_bits = math.log2(corpus.vocab_size) * corpus.tokens_per_byte
    results: dict[Path, dict[str, Any]] = {}
    columns = (TextColumn("sweep"), BarColumn(), TextColumn("{task.completed}/{task.total}  {task.fields[text]}"))
    with Progress(*columns, TimeElapsedColumn(), disable=quiet, console=Console(stderr=True)) as progress:
        task = progress.add_task("sweep", total=len(runs), text="")

        def done(run: Run, result: dict[str, Any]) -> None:
            results[run.folder] = result
            text = f"{run.variant} at {run.config.learning_rate:g}: {result.get(JUDGED) or result['status']}"
            progress.update(task, advance=1, text=text)
            write_json(out / SWEEP_FILE, without_nan(summarised(runs, results, start_bits)))

        execute(runs, processes, done, engine)
    return summarised(runs, results, start_bits)


def plan_sweep(
    variants: list[str], rates: Sequence[float], base: TrainConfig, text: Text, out: Path, seeds: int
) -> list[Run]:
    """Every variant with every rate and seed, seeds outermost."""
    rates = sorted(set(rates))
    if len(rates) < 2 or not all(math.isfinite(rate) and rate > 0 for rate in rates):
        raise ValueError(f"a sweep needs two or more positive rates; got {', '.join(map(str, rates)) or 'none'}")
    planned = [
        replace(run, folder=out / "runs" / run.variant / f"rate_{rate:g}" / f"seed_{run.config.seed}")
        for rate in rates
        for run in plan_runs(variants, with_rate(base, rate), seeds, text, out)
    ]
    return sorted(planned, key=lambda run: run.config.seed)


def summarised(runs: Sequence[Run], results: dict[Path, dict[str, Any]], start_bits: float) -> dict[str, Any]:
    """The runs that have ended, by variant.

    Args:
        runs: as planned.
        results: by folder of the run.
        start_bits: bits per byte of a model that has learned nothing; a run that diverged counts as that.

    Returns:
        `start_bits` and `variants`: per variant its `best_rate`, the `bits` there, whether that is `at_edge` of the
        rates, its `sensitivity`, and per rate the mean over seeds.

    Source: sensitivity, Wortsman et al. 2023, arXiv:2309.14322, section 2.2: the mean over rates of how much more than
    the best the loss is, with losses above that of the start cut.
    """
    rows = []
    for variant in dict.fromkeys(run.variant for run in runs):
        by_rate: dict[float, list[float]] = {}
        failed: list[str] = []
        for run in runs:
            result = results.get(run.folder)
            if run.variant != variant or result is None:
                continue
            if result["status"] == "failed":
                failed.append(f"rate {run.config.learning_rate:g}, seed {run.config.seed}: {result['message']}")
                continue
            bits = result.get(JUDGED) if result["status"] == "finished" else None
            by_rate.setdefault(run.config.learning_rate, []).append(min(bits or start_bits, start_bits))
        rows.append({"variant": variant, "failed": failed, **_sensitivity({r: fmean(b) for r, b in by_rate.items()})})
    return {"start_bits": start_bits, "variants": rows}


def _sensitivity(mean_bits: dict[float, float]) -> dict[str, Any]:
    rates = sorted(mean_bits)
    if not rates:
        return {"best_rate": None, "bits": None, "at_edge": None, "sensitivity": None, "rates": []}
    best = min(rates, key=lambda rate: mean_bits[rate])
    return {
        "best_rate": best,
        "bits": mean_bits[best],
        "at_edge": best in (rates[0], rates[-1]),
        "sensitivity": fmean(mean_bits[rate] - mean_bits[best] for rate in rates),
        "rates": [{"rate": rate, "bits": mean_bits[rate]} for rate in rates],
    }


def print_sweep(found: dict[str, Any]) -> None:
    """A row per variant: bits per byte at each rate, the best rate, and the sensitivity."""
    console = plain_console()
    rates = sorted({entry["rate"] for row in found["variants"] for entry in row["rates"]})
    table = Table("variant", *(f"{rate:g}" for rate in rates), "best rate", "bits/byte ↓", "sensitivity ↓")
    for row in found["variants"]:
        at = {entry["rate"]: f"{entry['bits']:.3f}" for entry in row["rates"]}
        best = ("-", "-", "-")
        if row["rates"]:
            best = (f"{row['best_rate']:g}", f"{row['bits']:.3f}", f"{row['sensitivity']:.3f}")
        table.add_row(row["variant"], *(at.get(rate, "-") for rate in rates), *best)
    console.print(table)
    for row in found["variants"]:
        for trouble in row["failed"]:
            console.print(f"{row['variant']}, {trouble}", style="red", markup=False, highlight=False, soft_wrap=True)
        if row["at_edge"]:
            text = f"{row['variant']}: the best rate is the {'lowest' if row['best_rate'] == rates[0] else 'highest'}"
            console.print(f"{text} that was tried; try rates beyond it", style="red", highlight=False, soft_wrap=True)
