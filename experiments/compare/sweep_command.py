"""`expertier sweep`, and what `compare --rates` reads; what needs torch is imported when it runs."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from routing.ground.expect import expect_not_an_input, expect_outputs

from ..train.description.description import RunDescription, described
from ..train.interrupt import hint_when_interrupted
from ..train.options import (
    ColumnOption,
    ConfigOption,
    DataOption,
    EngineOption,
    JsonOption,
    ProcessesOption,
    SetOption,
    StepsOption,
    TokenizerOption,
)
from ..train.presets import PRESETS

COMPARED_PRESET = "routers"
RoutersOption = Annotated[str, typer.Option(help="Variants or routers, with commas between them.")]
BaseOption = Annotated[
    str | None, typer.Option("--preset", help=f"One of {', '.join(PRESETS)}; default: {COMPARED_PRESET}.")
]
RatesOption = Annotated[
    str | None, typer.Option("--rates", help="Peak rates with commas between them; default: 1/4 to 4 times the base's.")
]


def sweep(
    routers: RoutersOption,
    out: Annotated[Path, typer.Option(help="Folder of the sweep; call again to continue it.")],
    rates: RatesOption = None,
    preset_name: BaseOption = None,
    config_file: ConfigOption = None,
    settings: SetOption = None,
    data: DataOption = None,
    column: ColumnOption = None,
    tokenizer: TokenizerOption = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs per variant and rate.")] = 1,
    steps: StepsOption = None,
    processes: ProcessesOption = 1,
    engine: EngineOption = "local",
    json_file: JsonOption = None,
) -> None:
    """Train each variant at several learning rates: its best rate, and how sensitive it is to a wrong one.

    Example: `expertier sweep --routers top2,loss-free --rates 1e-3,3e-3,1e-2 --out runs/rates`
    """
    expect_outputs(json_file, inputs=[data, config_file])
    said = {"data": data, "column": column, "tokenizer": tokenizer, "steps": steps}
    base = described_base(out, preset_name, config_file, settings, said)
    from routing.ground.files import write_json

    from .sweep import AROUND, print_sweep
    from .sweep import sweep as run

    asked = _numbers(rates) if rates else [base.config.learning_rate * factor for factor in AROUND]
    names = [name.strip() for name in routers.split(",") if name.strip()]
    with hint_when_interrupted(f"{out} keeps what was done; the same command continues"):
        found = run(names, asked, base.config, base.text, out, seeds=seeds, processes=processes, engine=engine)
    print_sweep(found)
    if json_file:
        write_json(json_file, found)
    if all(row["best_rate"] is None for row in found["variants"]):
        raise RuntimeError("no run ended; the reasons are above")
    typer.echo(f"compare --rates {out / 'sweep.json'} trains each variant at its best rate")


def described_base(
    out: Path, preset_name: str | None, config_file: Path | None, settings: list[str] | None, said: dict[str, Any]
) -> RunDescription:
    """The base of a comparison: of the preset that was asked for, or of the usual one if no file says it.

    Raises:
        ValueError: if a setting is unknown, the text is not there, or `out` is the text.
    """
    preset = {"preset": preset_name or (None if config_file else COMPARED_PRESET)}
    base = described(config_file, settings or [], preset | said)
    base.text.expect_there()
    expect_not_an_input(out, *([Path(base.text.data)] if base.text.data else []))
    return base


def read_rates(file: Path) -> dict[str, float]:
    """The best rate of each variant of a sweep.

    Raises:
        ValueError: if the file is no report of a sweep.
    """
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))["variants"]
        return {row["variant"]: float(row["best_rate"]) for row in rows}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is no finished report of `expertier sweep` ({error}); give its sweep.json") from error


def _numbers(text: str) -> list[float]:
    try:
        return [float(number) for number in text.split(",")]
    except ValueError as error:
        raise ValueError(f"--rates must be numbers with commas between them, such as 1e-3,3e-3; got {text}") from error
