"""`expertier bench claim`: what a paper claims, tried at toy size over several seeds.

No parity gate: losses are compared, not times. Tests hold every mechanism against plain loops.
"""

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Column, Table

from routing.ground.expect import expect_name, expect_outputs
from routing.ground.terminal import plain_console

from ...evidence.record import RECORDS, expect_records, save_record
from .catalogue import CLAIMS
from .claim import Expected, Verdict


def bench_claim(
    name: Annotated[str, typer.Argument(help=f"Which one: {', '.join(CLAIMS)}.")],
    seeds: Annotated[int, typer.Option(min=1, help="Runs of every variant, from other draws each.")] = 3,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps; default: the claim's own.")] = None,
    first_seed: Annotated[int, typer.Option(min=0, help="The others follow it.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the rows there.")] = None,
    record: Annotated[bool, typer.Option("--record", help="Keep the rows under experiments/records.")] = False,
    records: Annotated[Path, typer.Option(help="Where records live.")] = RECORDS,
) -> None:
    """Try a paper's claim with models that train in seconds; the table has means, and least to most, over seeds.

    Below it stand the verdicts: what the paper makes one expect, and the gain over seeds with its 95 % interval.

    Example: `expertier bench claim mode --seeds 3`
    """
    from routing.ground.files import write_json

    claim = CLAIMS[expect_name(name, CLAIMS, "claim")]
    expect_outputs(json_file, inputs=[])
    expect_records(records)
    steps = claim.steps if steps is None else steps
    rows = [
        {"variant": row.pop("variant"), "seed": seed, **row}
        for seed in range(first_seed, first_seed + seeds)
        for row in claim.run(steps, seed)
    ]
    plain_console().print(f"{claim.question} ({claim.source})")
    plain_console().print(summary(rows))
    verdicts = [expected.judge(rows) for expected in claim.expected]
    if verdicts:
        plain_console().print(verdict_table(verdicts))
    judged = [asdict(verdict) for verdict in verdicts]
    if json_file:
        write_json(json_file, {"claim": name, "steps": steps, "rows": rows, "verdicts": judged})
    if record:
        config = {"claim": name, "steps": steps, "seeds": seeds, "question": claim.question, "source": claim.source}
        config |= {"verdicts": judged}
        typer.echo(f"record: {save_record(f'claim-{name}', rows, config=config, seed=first_seed, folder=records)}")


def summary(rows: list[dict[str, Any]]) -> Table:
    """One line per variant: the mean of each number over seeds, and its least and most where seeds differ."""
    columns = [column for column in rows[0] if column not in ("variant", "seed")]
    table = Table(Column("variant", no_wrap=True), *columns)
    for variant in dict.fromkeys(row["variant"] for row in rows):
        runs = [row for row in rows if row["variant"] == variant]
        table.add_row(variant, *(_cell([run[column] for run in runs]) for column in columns))
    return table


def verdict_table(verdicts: Sequence[Verdict]) -> Table:
    """One line per expectation; a gain above 0 is better, whatever the direction of the measure."""
    table = Table("expected", "measure", "gain [95 % interval]", "verdict")
    for verdict in verdicts:
        expected = verdict.expected
        interval = "" if verdict.interval is None else f" [{verdict.interval[0]:+.4g}, {verdict.interval[1]:+.4g}]"
        table.add_row(
            _statement(expected),
            f"{expected.measure}, {expected.better} is better",
            f"{verdict.gain:+.4g}{interval}",
            verdict.answer,
        )
    return table


def _statement(expected: Expected) -> str:
    if expected.by < 0:
        return f"{expected.variant} at most {-expected.by:g} worse than {expected.against}"
    return f"{expected.variant} better than {expected.against}" + (f" by {expected.by:g}" if expected.by else "")


def _cell(values: list[float | None]) -> str:
    found = [value for value in values if value is not None]
    if not found:
        return "-"
    mean, least, most = statistics.fmean(found), min(found), max(found)
    return f"{mean:.4g}" if least == most else f"{mean:.4g} ({least:.4g} to {most:.4g})"
