"""`expertier finetune`: fine-tune a model whose experts stay on disk."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from routing.ground.expect import expect_there
from routing.ground.files import write_json
from routing.ground.quantity import format_size
from routing.ground.terminal import plain_console

from ..options import JsonFile, Model, expect_model, quiet_transformers, with_options
from .options import FinetuneOptions


@with_options(FinetuneOptions)
def finetune(
    model: Model,
    data: Annotated[
        Path, typer.Option("--data", help="A text, a .jsonl of text, prompt+completion or messages, or a folder.")
    ],
    out: Annotated[Path, typer.Option("--out", help="The run's folder: metrics, commits, and the result.")],
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out after its last commit.")] = False,
    json_file: JsonFile = None,
    *,
    options: FinetuneOptions,
) -> None:
    """Fine-tune a mixture of experts that does not fit in memory; its experts stay on disk.

    zo needs no backward pass, lora trains adapters of a frozen (also quantised) model, full trains everything.

    Example: `expertier finetune my-model --data chats.jsonl --method lora --steps 200 --out tuned --cpu-memory 12GiB`
    """
    expect_model(model)
    expect_there(data, Path(options.usage) if options.usage else None)
    settings = options.for_run()
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from ...finetune.tune import fine_tune

    quiet_transformers()
    console = plain_console(stderr=True)
    columns = (TextColumn("finetune"), BarColumn(), TextColumn("{task.fields[text]}"), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress, _interrupt_noted() as is_interrupted:
        task = progress.add_task("finetune", total=settings.steps, text="reading the model")

        def advance(row: dict[str, Any]) -> None:
            moved = f"read {format_size(row['bytes_read'])}, wrote {format_size(row['bytes_written'])}"
            text = (
                f"{row['step']}/{settings.steps}  loss {row['loss']:.4f}  {row['tokens_per_second']:.0f} tok/s  {moved}"
            )
            progress.update(task, completed=row["step"], text=text)

        last = fine_tune(
            model,
            data,
            out,
            settings,
            cache_experts=options.cache_experts,
            cpu_memory=options.cpu_memory,
            resume=resume,
            advance=advance,
            is_interrupted=is_interrupted,
        )
    if json_file:
        write_json(json_file, {"model": model, "options": settings.as_json(), "last": last})
    console.print(f"written to {out}", soft_wrap=True)


@contextmanager
def _interrupt_noted() -> Iterator[Callable[[], bool]]:
    """Note Ctrl-C and SIGTERM, so that the step that they come in is committed; the second one acts at once."""
    noted: list[int] = []

    def note(number: int, frame: Any) -> None:
        if noted:
            raise KeyboardInterrupt
        noted.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(noted)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
