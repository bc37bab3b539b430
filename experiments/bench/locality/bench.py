"""`expertier bench locality`: variants and seeds trained alike, then judged by loss, caches, the SSD and placement."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from routing.ground.expect import expect_not_an_input, expect_outputs

from ...compare.sweep_command import read_rates
from ...evidence.record import expect_records
from ...train.interrupt import hint_when_interrupted
from ...train.options import DataOption, EngineOption, JsonOption, ProcessesOption
from ...train.presets import TrainConfig, preset, with_steps
from ...train.text.documents import expect_data

if TYPE_CHECKING:
    from ...compare.runs import Run

DEFAULT_TOKENS = 4_194_304
"""Tokens of a run: 4,096 steps of 1,024."""
LEARNING_RATE = 1.5e-3
"""The best of 1.5, 3 and 6 thousandths after a million tokens for olmoe, resident-4th, pool and reuse-overlap alike."""


def base_config(tokens: int) -> TrainConfig:
    """4 layers of 32 experts, top-2, so that an eighth of the experts holds two tokens' needs."""
    base = preset("chains")
    own = {"num_experts_per_tok": 2, "moe_intermediate_size": 64, "num_shared_experts": 0, "router": "olmoe"}
    base = replace(base, model=base.model | own | {"balance_loss_weight": 0.01}, learning_rate=LEARNING_RATE)
    return with_steps(base, max(1, tokens // (base.batch_size * base.accumulation * base.sequence_length)))


def bench_locality(
    out: Annotated[Path, typer.Option(help="Folder of the runs; call again to continue it.")],
    data: DataOption = None,
    variants: Annotated[
        str | None, typer.Option(help="With commas between them; default: all, baseline first.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs per variant.")] = 3,
    tokens: Annotated[int, typer.Option(min=1, help="Training tokens of a run.")] = DEFAULT_TOKENS,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps instead of --tokens.")] = None,
    rates: Annotated[Path | None, typer.Option(help="A sweep.json, for a learning rate of each variant's own.")] = None,
    processes: ProcessesOption = 1,
    engine: EngineOption = "local",
    json_file: JsonOption = None,
    records: Annotated[Path | None, typer.Option(help="Also save a record under this folder.")] = None,
) -> None:
    """Train routers for locality and ordinary ones alike; report loss, reuse, hit rates, reads, speed and fan-out.

    Runs for nights and may be killed: the same command goes on. Speeds are measured after all training, one run at a
    time. Nothing is shown unless the model from the SSD gives the resident model's logits.

    Example: `expertier bench locality --out runs/locality --tokens 4194304 --seeds 3`
    """
    expect_outputs(json_file, inputs=[data, rates])
    expect_not_an_input(out, *([Path(data)] if data else []))
    expect_data(data)
    if records is not None:
        expect_records(records)
    base = base_config(tokens) if steps is None else with_steps(base_config(tokens), steps)
    from routing.ground.files import write_json

    with hint_when_interrupted(f"{out} keeps what was done; the same command continues"):
        report = compare_locality(
            _names(variants),
            base,
            out,
            seeds=seeds,
            data=data,
            rates=None if rates is None else read_rates(rates),
            processes=processes,
            engine=engine,
        )
    show(report)
    if json_file:
        write_json(json_file, report)
    if records is not None:
        typer.echo(f"record: {_record(report, records)}")


def _names(variants: str | None) -> list[str]:
    """Raises ValueError for a name that is unknown."""
    from ...variants.catalogue import expect_variant
    from ...variants.locality import LOCALITY_VARIANTS, ORDINARY

    if variants is None:
        return [*ORDINARY, *LOCALITY_VARIANTS]
    names = [name.strip() for name in variants.split(",") if name.strip()]
    for name in names:
        expect_variant(name)
    return names


def compare_locality(
    names: list[str],
    base: TrainConfig,
    out: Path,
    *,
    seeds: int,
    data: str | None,
    rates: Mapping[str, float] | None = None,
    processes: int = 1,
    engine: str = "local",
) -> dict[str, Any]:
    """Train what is missing, measure what is not measured, and put it together.

    Returns:
        `config`, `runs`, `variants` (see `rows_of`) and `claims` (see `claims_of`); also `<out>/locality.json`.

    Raises:
        RuntimeError: if no run finished, or an offloaded model is not the resident one.
    """
    from dataclasses import asdict

    from routing.ground.files import write_json

    from ...compare.engines import execute
    from ...compare.runs import Text, plan_runs
    from ...train.metrics import without_nan
    from .measures import measure
    from .table import claims_of, rows_of

    text = Text(data=data)
    runs = plan_runs(names, base, seeds, text, out, rates)
    ended: dict[Path, dict[str, Any]] = {}

    def note(run: "Run", result: dict[str, Any]) -> None:
        ended[run.folder] = result
        typer.echo(f"{len(ended)} of {len(runs)}: {run.variant} seed {run.config.seed} {result['status']}", err=True)

    execute(runs, processes, note, engine)
    corpus = text.load()
    results = []
    for run in runs:
        result = ended[run.folder]
        own = measure(run, corpus) if result["status"] == "finished" else {}
        results.append(result | own)
    if not any(result["status"] == "finished" for result in results):
        reasons = "; ".join(f"{result['variant']}: {result.get('message')}" for result in results)
        raise RuntimeError(f"no run finished: {reasons}")
    report = {
        "config": asdict(base),
        "runs": results,
        "variants": rows_of(results),
        "claims": claims_of(results),
    }
    write_json(out / "locality.json", without_nan(report))
    return report


def show(report: dict[str, Any]) -> None:
    """Print the tables, and what did not finish."""
    from routing.ground.terminal import plain_console

    from .table import claims_table, tables_of

    console = plain_console()
    for table in tables_of(report["variants"]):
        console.print(table)
    if report["claims"]:
        console.print(claims_table(report["claims"]))
    for run in report["runs"]:
        if run["status"] != "finished":
            console.print(f"{run['variant']} seed {run['seed']} {run['status']}: {run['message']}", markup=False)


def _record(report: dict[str, Any], records: Path) -> Path:
    from ...evidence.record import save_record
    from .table import COLUMNS

    names = ("variant", "seed", "status", *COLUMNS)
    rows = [{name: run.get(name, "") for name in names} for run in report["runs"]]
    return save_record("locality", rows, config=report["config"], seed=report["config"]["seed"], folder=records)
