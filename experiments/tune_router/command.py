"""`expertier tune-router`; what needs torch is imported when it runs."""

from pathlib import Path
from typing import Annotated, Any

import typer

from routing.ground.expect import expect_not_an_input, expect_outputs
from routing.ground.terminal import plain_console

from ..train.interrupt import hint_when_interrupted
from ..train.options import DataOption, JsonOption
from ..train.presets import TrainConfig
from ..train.run_folder import expect_startable
from ..train.text.documents import expect_data

SHOWN = ("held_out_bits_per_byte", "adjacent_reuse", "lru_12.5", "lru_25", "lru_50", "belady_25", "srp", "sch")


def tune_router(
    model: Annotated[Path, typer.Argument(help="A checkpoint folder: ours, olmoe, qwen3_moe or mixtral.")],
    out: Annotated[Path, typer.Option(help="Folder of the run; becomes a checkpoint of the same family.")],
    data: DataOption = None,
    loss: Annotated[str, typer.Option(help="replaced_l1, l2, overlap, recent_use, or none.")] = "recent_use",
    weight: Annotated[float, typer.Option(help="Coefficient of that loss.")] = 0.1,
    anchor: Annotated[float, typer.Option(help="Coefficient of the KL divergence from the router before.")] = 0.1,
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps.")] = 200,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Sequences per step.")] = 4,
    sequence_length: Annotated[int, typer.Option("--sequence-length", min=2, help="Tokens per sequence.")] = 256,
    rate: Annotated[float, typer.Option("--learning-rate", help="Peak of a cosine schedule.")] = 1e-3,
    held_out_tokens: Annotated[int, typer.Option("--held-out-tokens", min=1, help="Tokens that are scored.")] = 16_384,
    seed: Annotated[int, typer.Option(help="Of the order of batches.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out, with the same options.")] = False,
    json_file: JsonOption = None,
) -> None:
    """Train the gates of a model, and nothing else, so that neighbouring tokens reuse experts; safe to kill.

    Prints loss, reuse and hit rates on held-out text before and after.

    Example: `expertier tune-router runs/my-model --data text.txt --out runs/tuned --loss overlap --weight 0.05`
    """
    if not model.is_dir():
        raise ValueError(f"{model} is no checkpoint folder; give one that holds config.json and safetensors")
    expect_outputs(json_file, inputs=[data, model])
    expect_not_an_input(out, model, *([Path(data)] if data else []))
    expect_data(data)
    expect_startable(out, resume=resume)
    run = TrainConfig(
        steps=steps,
        batch_size=batch_size,
        sequence_length=sequence_length,
        learning_rate=rate,
        min_learning_rate=rate / 10,
        warmup_steps=min(10, steps),
        seed=seed,
        precision="float32",
        checkpoint_every=50,
        evaluate_every=max(1, steps),
        held_out_tokens=held_out_tokens,
    )
    from routing.ground.files import write_json

    from .tuning import TuneOptions, text_for
    from .tuning import tune_router as tune

    options = TuneOptions(loss=loss, weight=weight, anchor=anchor, run=run)
    with hint_when_interrupted(f"{out} keeps what was done; the same command with --resume continues"):
        report = tune(model, text_for(model, data), out, options, resume=resume)
    show(report)
    if json_file:
        write_json(json_file, report)


def show(report: dict[str, Any]) -> None:
    """Print the measures before and after."""
    from rich.table import Table

    table = Table("held-out text", "before", "after", "change")
    for name in SHOWN:
        before, after = report["before"][name], report["after"][name]
        if before is not None and after is not None:
            table.add_row(name, f"{before:.4f}", f"{after:.4f}", f"{after - before:+.4f}")
    plain_console().print(table)
