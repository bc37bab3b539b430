"""Compare routers: the same model, text and seeds with each of them; a table, figures and a JSON report."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from routing.ground.files import write_json

from ..evidence.record import save_record
from ..train.corpus import load_corpus, windows
from ..train.metrics import read_log
from ..train.presets import TrainConfig
from ..train.run_folder import LOG_FILE, expect_same_text
from .page import write_page
from .runs import Run, execute, plan_runs
from .summary import METRICS, cell, summarise

SMOOTHED = 20
SHOWN = (
    "held_out_bits_per_byte",
    "flops_per_token",
    "parameters",
    "true_load",
    "max_vio",
    "dead_experts",
    "inner_balance",
    "mutual_information",
    "predictability",
    "lru_hit_rate",
    "srp",
)


def compare(
    variants: Sequence[str],
    base: TrainConfig,
    out: Path,
    *,
    seeds: int = 2,
    data: str | None = None,
    processes: int = 1,
    quiet: bool = False,
) -> dict[str, Any]:
    """Run what is missing and report on everything; safe to kill and call again.

    Args:
        variants: names of `VARIANTS` or `routing.ROUTERS`.
        base: the preset; each variant changes its router, zero-compute experts and K.
        out: folder of the comparison.
        seeds: per variant.
        data: the text, as `load_corpus` takes it.
        processes: runs at a time.
        quiet: no progress bar.

    Returns:
        The report, which is also `<out>/compare.json`; `<out>/compare.html` shows it.

    Raises:
        ValueError: if a variant is unknown or does not fit, the text cannot be read or is too short, or `out` holds a
            comparison with other settings or on another text.
    """
    if processes < 1:
        raise ValueError(f"processes must be at least 1; got {processes}")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; a comparison needs a folder")
    runs = plan_runs(list(variants), base, seeds, data, out)
    corpus = load_corpus(data)
    windows(corpus.train, base.sequence_length)  # raises before any run if the text is too short
    for run in runs:
        expect_same_text(run.folder, corpus)
    results: dict[Path, dict[str, Any]] = {}
    columns = (TextColumn("compare"), BarColumn(), TextColumn("{task.completed}/{task.total}  {task.fields[text]}"))
    with Progress(*columns, TimeElapsedColumn(), disable=quiet, console=Console(stderr=True)) as progress:
        task = progress.add_task("compare", total=len(runs), text="")

        def done(run: Run, result: dict[str, Any]) -> None:
            results[run.folder] = result
            bits = result.get("held_out_bits_per_byte")
            text = (
                f"{run.variant} seed {run.config.seed}: {result['status'] if bits is None else f'{bits:.3f} bits/byte'}"
            )
            progress.update(task, advance=1, text=text)
            report(runs, results, base, out)

        execute(runs, processes, done)
    return report(runs, results, base, out)


def report(runs: list[Run], results: dict[Path, dict[str, Any]], base: TrainConfig, out: Path) -> dict[str, Any]:
    """Write JSON and page from the runs that have ended."""
    ended = [run for run in sorted(runs, key=lambda run: _order(runs, run)) if run.folder in results]
    rows = summarise([results[run.folder] for run in ended])
    curves: dict[str, list[list[tuple[int, float]]]] = {}
    for run in ended:
        curves.setdefault(run.variant, []).append(_curve(run))
    seeds = len({run.config.seed for run in runs})
    facts = (
        f"{base.model.get('num_hidden_layers')} layers, width {base.model.get('hidden_size')}, "
        f"{base.model.get('num_experts')} experts of width {base.model.get('moe_intermediate_size')}; "
        f"{base.steps} steps of {base.batch_size * base.accumulation * base.sequence_length} tokens; "
        f"{seeds} seed(s); text: "
        f"{runs[0].data or 'the standard library of the running Python'}. {len(ended)} of {len(runs)} runs have ended."
    )
    if seeds > 1:
        facts += " ± is the standard deviation over seeds."
    content = {"facts": facts, "config": asdict(base), "variants": rows, "runs": [results[run.folder] for run in ended]}
    write_json(out / "compare.json", content)
    write_page(out / "compare.html", rows, curves, facts)
    return content


def print_table(rows: list[dict[str, Any]]) -> None:
    """The columns that decide, in as many tables as the terminal's width asks for; the page has all of them."""
    console = Console()
    variants = [row["variant"] for row in rows]
    for names in _fitting(rows, max(map(len, variants)), console.width):
        table = Table(Column("variant", no_wrap=True), *(Column(METRICS[name].label, no_wrap=True) for name in names))
        for row in rows:
            table.add_row(row["variant"], *(cell(row, name) for name in names))
        console.print(table)
    for row in rows:
        for trouble in row["troubles"]:
            console.print(f"{row['variant']}, {trouble}", style="red", markup=False, highlight=False, soft_wrap=True)


def _fitting(rows: list[dict[str, Any]], name_width: int, width: int) -> list[list[str]]:
    """SHOWN, cut into groups whose tables are at most `width` wide (at least one column each)."""
    border, groups, used = 3, [], width
    for name in SHOWN:
        own = border + max(len(METRICS[name].label), *(len(cell(row, name)) for row in rows))
        if used + own > width:
            groups.append([])
            used = border + max(name_width, len("variant")) + 1
        groups[-1].append(name)
        used += own
    return groups


def record_comparison(content: dict[str, Any], slug: str) -> Path:
    """Save a report's runs under experiments/records; a person adds the README beside them."""
    columns = ["variant", "seed", "status", "steps", *METRICS]
    rows = [{name: run.get(name, "") for name in columns} for run in content["runs"]]
    config = content["config"] | {"variants": [row["variant"] for row in content["variants"]]}
    return save_record(slug, rows, config=config, seed=content["config"]["seed"])


def _order(runs: list[Run], run: Run) -> tuple[int, int]:
    names = list(dict.fromkeys(other.variant for other in runs))
    return names.index(run.variant), run.config.seed


def _curve(run: Run) -> list[tuple[int, float]]:
    """Training bits per byte, each the mean of the last SMOOTHED steps."""
    log = run.folder / LOG_FILE
    bits = [row["bits_per_byte"] for row in read_log(log)] if log.is_file() else []
    steps = [step for step in range(1, len(bits) + 1) if step % 5 == 0 or step == len(bits)]
    return [(step, statistics.fmean(bits[max(0, step - SMOOTHED) : step])) for step in steps]
