"""Quality against stored bits: models in every form of `pack` and of llama.cpp, judged on held-out text.

Each seed trains a model of its own, so rankings rest on several. A folder keeps models and packed copies, and a run
that was interrupted goes on. No parity gate: nothing is timed, and tests compare every stored form with other decoders.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
from rich.table import Table

from routing.ground.expect import expect_name
from routing.ground.terminal import plain_console

from ...evidence.record import RECORDS, expect_records, save_record
from ..offloading.llama_cpp import NOT_INSTALLED, is_available
from .cases import Case, chosen
from .judged import CALIBRATION_TOKENS, JudgedModel
from .models import PRESETS, Subject, given, trained
from .verdicts import verdicts


def bench_low_bits(
    work: Annotated[Path, typer.Option("--work", help="Folder for models and packed copies; reused if it is there.")],
    preset: Annotated[str, typer.Option("--preset", help="Model to train: mixture (width 128) or e16.")] = "mixture",
    model: Annotated[
        Path | None, typer.Option("--model", help="A model folder, in bfloat16, instead of training.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="Text to train on and to judge on. Default: standard library.")
    ] = None,
    case: Annotated[
        list[str] | None, typer.Option("--case", help="A way to store experts, such as int4.gptq; repeat for more.")
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Models to train.")] = 3,
    steps: Annotated[int, typer.Option("--steps", min=40, help="Optimiser steps of each.")] = 300,
    tokens: Annotated[int, typer.Option("--tokens", min=256, help="Held-out tokens to judge on.")] = 4_096,
    records: Annotated[Path, typer.Option("--records", help="Where the record is kept.")] = RECORDS,
) -> None:
    """Store the experts of models in every form, ours and llama.cpp's, and compare them with the originals.

    Example: `expertier bench low-bits --work /tmp/low-bits --preset e16`

    Or, of a model that is there: `expertier bench low-bits --work /tmp/low-bits --model my-model`
    """
    expect_records(records)
    expect_name(preset, PRESETS, "preset")
    cases = chosen(case)
    if work.exists() and not work.is_dir():
        raise ValueError(f"--work {work} is a file; give a folder")
    for given_path, option in ((model, "--model"), (data, "--data")):
        if given_path is not None and not given_path.exists():
            raise ValueError(f"{option} {given_path}: no such file or folder")
    console = plain_console(stderr=True)
    if any(each.is_theirs for each in cases) and not is_available():
        console.print(f"{NOT_INSTALLED}: its quantisers are left out")
        cases = tuple(each for each in cases if not each.is_theirs)
    subjects = (
        [given(work, model, data)]
        if model is not None
        else [trained(work / f"seed-{seed}", preset, seed, steps, data) for seed in range(seeds)]
    )
    rows = _rows(subjects, cases, tokens)
    _show(rows, cases)
    config = {
        "model": PRESETS[preset]().model if model is None else model.name,
        "steps": steps if model is None else 0,
        "seeds": len(subjects),
        "tokens": tokens,
        "calibration": CALIBRATION_TOKENS,
    }
    name = "low-bits" if model is None and preset == "mixture" else f"low-bits-{model.name if model else preset}"
    save_record(name, rows, config=config, seed=0, folder=records)


def _rows(subjects: Sequence[Subject], cases: Sequence[Case], tokens: int) -> list[dict[str, Any]]:
    rows = []
    with TemporaryDirectory() as scratch:
        for subject in subjects:
            place = Path(scratch) / str(subject.seed)
            place.mkdir()
            judged = JudgedModel(subject, tokens, place)
            for case in cases:
                told = {key: value for key, value in asdict(case).items() if key != "bits"}
                rows.append({"seed": subject.seed, "case": case.name, **told, **judged.found(case)})
                plain_console(stderr=True).print(" ".join(f"{key}={_short(value)}" for key, value in rows[-1].items()))
    return rows


def _short(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _show(rows: Sequence[dict[str, Any]], cases: Sequence[Case]) -> None:
    table = Table("case", "bits", "more loss, %", "same greedy token", "divergence")
    for case in cases:
        of = [row for row in rows if row["case"] == case.name]

        def mean(key: str, of: list[dict[str, Any]] = of) -> float:
            return float(sum(row[key] for row in of) / len(of))

        share = sum(row["loss_difference"] / row["reference_loss"] for row in of) / len(of)
        table.add_row(
            *(case.name, f"{mean('bits'):.2f}", f"{100 * share:+.2f}"),
            *(f"{mean('agreement'):.2%}", f"{mean('divergence'):.5f}"),
        )
    console = plain_console()
    console.print(table)
    for verdict in verdicts(rows):
        ratios = ", ".join(f"{ratio:.2f}" for ratio in verdict.ratios)
        console.print(f"{verdict.question}: {verdict.winner} has {ratios} of its divergence", soft_wrap=True)
