"""Compare routers: the same model, text and seeds with each of them; a table, figures and a JSON report."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from routing.ground.files import write_json
from routing.ground.terminal import plain_console

from ..evidence.pages import provenance
from ..evidence.record import save_record
from ..train.corpus import windows
from ..train.description.config import TrainConfig
from ..train.metrics import read_log, without_nan
from ..train.run_folder import LOG_FILE, expect_same_text
from ..train.text.chosen import Text
from .engines import execute
from .judged import Judging, stated_margin
from .page import write_page
from .runs import Run, plan_runs
from .summary import METRICS, cell, difference_cell, summarise

SMOOTHED = 20
"""Steps that a point of a learning curve is the mean of: one batch's loss varies more than variants differ."""
SHOWN = (
    "held_out_bits_per_byte",
    "cloze",
    "copying",
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
    column: str = "text",
    tokenizer: str | None = None,
    processes: int = 1,
    engine: str = "local",
    rates: Mapping[str, float] | None = None,
    margin: float | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Run what is missing and report on everything; safe to kill and call again.

    Args:
        variants: names of `VARIANTS` or `routing.ROUTERS`.
        base: the preset; each variant changes its router, zero-compute experts and K.
        out: folder of the comparison.
        seeds: runs per variant, with the seeds `base.seed`, `base.seed + 1` and so on.
        data, column, tokenizer: the text, as `load_corpus` takes it.
        processes: runs at a time.
        engine: who executes them, a key of `engines.ENGINES`.
        rates: learning rate of each variant, such as `expertier sweep` finds; None for the base's.
        margin: bits per byte within which variants count as equal; stated before the first run, or not at all.
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
    text = Text(data=data, column=column, tokenizer=tokenizer)
    runs = plan_runs(list(variants), base, seeds, text, out, rates)
    _expect_text(text, runs, base, quiet)
    judging = Judging(margin=stated_margin(out, margin), is_tuned=rates is not None)
    results: dict[Path, dict[str, Any]] = {}
    content: dict[str, Any] = {}
    num_ended = sum(run.result is not None for run in runs)
    columns = (TextColumn("compare"), BarColumn(), TextColumn("{task.completed}/{task.total}  {task.fields[text]}"))
    with Progress(*columns, TimeElapsedColumn(), disable=quiet, console=Console(stderr=True)) as progress:
        task = progress.add_task("compare", total=len(runs), text="")

        def done(run: Run, result: dict[str, Any]) -> None:
            nonlocal content
            results[run.folder] = result
            bits = result.get("held_out_bits_per_byte")
            text = (
                f"{run.variant} seed {run.config.seed}: {result['status'] if bits is None else f'{bits:.3f} bits/byte'}"
            )
            progress.update(task, advance=1, text=text)
            if len(results) >= num_ended:  # figures take a second: one page for all that had ended before
                content = report(runs, results, base, out, judging)

        execute(runs, processes, done, engine)
    return content


def _expect_text(text: Text, runs: list[Run], base: TrainConfig, quiet: bool) -> None:
    """Read the text, say what it is, and refuse it before any run if it is too short or not that of these runs."""
    corpus = text.load()
    for stream in (corpus.train, corpus.held_out):
        windows(stream, base.sequence_length)
    if not quiet:
        console = Console(stderr=True, soft_wrap=True)
        console.print(f"text: {corpus.source}: {corpus.summary}", highlight=False, markup=False)
    for run in runs:
        expect_same_text(run.folder, corpus)


def report(
    runs: list[Run], results: dict[Path, dict[str, Any]], base: TrainConfig, out: Path, judging: Judging
) -> dict[str, Any]:
    """Write JSON and page from the runs that have ended."""
    ended = [run for run in sorted(runs, key=lambda run: _order(runs, run)) if run.folder in results]
    rows = summarise([results[run.folder] for run in ended], judging.margin)
    curves: dict[str, list[list[tuple[int, float]]]] = {}
    for run in ended:
        curves.setdefault(run.variant, []).append(_curve(run))
    facts = _facts(runs, len(ended), base) | judging.facts
    warnings = judging.warnings(runs)
    content = {
        "facts": "; ".join(f"{name}: {value}" for name, value in facts.items()),
        "config": asdict(base),
        "margin": judging.margin,
        "warnings": warnings,
        "variants": rows,
        "runs": [results[run.folder] for run in ended],
    }
    write_json(out / "compare.json", without_nan(content))
    write_page(out / "compare.html", rows, curves, facts, warnings)
    return content


def _facts(runs: list[Run], num_ended: int, base: TrainConfig) -> dict[str, str]:
    """What the page says of how the runs were made."""
    model, seeds = base.model, sorted({run.config.seed for run in runs})
    text = runs[0].text
    read_as = "bytes" if text.tokenizer is None else f"tokens of {text.tokenizer}"
    return {
        "model": f"{model.get('num_hidden_layers')} layers, width {model.get('hidden_size')}, "
        f"{model.get('num_experts')} experts of width {model.get('moe_intermediate_size')}, unless the variant says "
        "otherwise",
        "training": f"{base.steps} steps of {base.batch_size * base.accumulation * base.sequence_length:,} tokens in "
        f"sequences of {base.sequence_length}; learning rate {_rates(runs)} "
        f"({base.schedule}, {base.warmup_steps} steps of warm-up); precision {base.precision}",
        "seeds": f"{', '.join(map(str, seeds))}{'; ± is the standard deviation over them' if len(seeds) > 1 else ''}",
        "text": f"{text.data or 'the standard library of the running Python'}, read as {read_as}",
        "runs": f"{num_ended} of {len(runs)} have ended",
        **provenance(),
    }


def _rates(runs: list[Run]) -> str:
    """The peak and the last rate, of each variant where they differ."""
    rates = {run.variant: (run.config.learning_rate, run.config.min_learning_rate) for run in runs}
    said = {name: f"{peak:g} to {last:g}" for name, (peak, last) in rates.items()}
    if len(set(said.values())) == 1:
        return said[runs[0].variant]
    return ", ".join(f"{text} for {name}" for name, text in said.items())


def print_table(rows: list[dict[str, Any]], warnings: Sequence[str] = ()) -> None:
    """The columns that decide, in as many tables as the terminal's width asks for; the page has all of them."""
    console = plain_console()
    for warning in warnings:
        console.print(warning, style="red", markup=False, highlight=False, soft_wrap=True)
    variants = [row["variant"] for row in rows]
    for names in _fitting(rows, max(map(len, variants)), console.width):
        table = Table(Column("variant", no_wrap=True), *(Column(METRICS[name].heading, no_wrap=True) for name in names))
        for row in rows:
            table.add_row(row["variant"], *(cell(row, name) for name in names))
        console.print(table)
    if len(rows) > 1:
        console.print(_verdicts(rows))
    for row in rows:
        for trouble in row["troubles"]:
            console.print(f"{row['variant']}, {trouble}", style="red", markup=False, highlight=False, soft_wrap=True)


def _verdicts(rows: list[dict[str, Any]]) -> Table:
    """What the seeds show about each variant beside the first one."""
    title = "bits/byte against the first, paired by seed, 95 %"
    folded = (Column(heading, overflow="fold") for heading in ("difference", "effect size", ""))
    headings = (Column("variant", no_wrap=True), *folded)
    table = Table(*headings, title=title, title_justify="left")
    for row in rows:
        table.add_row(row["variant"], *difference_cell(row))
    return table


def _fitting(rows: list[dict[str, Any]], name_width: int, width: int) -> list[list[str]]:
    """SHOWN, cut into groups whose tables are at most `width` wide (at least one column each)."""
    border, groups, used = 3, [], width
    for name in SHOWN:
        own = border + max(len(METRICS[name].heading), *(len(cell(row, name)) for row in rows))
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
    bits = [row["bits_per_byte"] for row in read_log(log) if row["bits_per_byte"] is not None] if log.is_file() else []
    steps = [step for step in range(1, len(bits) + 1) if step % 5 == 0 or step == len(bits)]
    return [(step, statistics.fmean(bits[max(0, step - SMOOTHED) : step])) for step in steps]
