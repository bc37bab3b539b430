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
from ..processes import joined_processes
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

    On two processes: `--method zo --processes 2`; the result is that of one, bit by bit.
    """
    expect_model(model)
    expect_there(data, Path(options.usage) if options.usage else None)
    settings = options.for_run()
    several = joined_processes() if settings.processes > 1 else None
    if several is not None and not several.are_started():
        raise typer.Exit(several.start(settings.processes))

    from ...finetune.tune import fine_tune

    quiet_transformers()
    peers = None if several is None else several.peers()
    is_speaking = peers is None or peers.number == 0
    with _shown(settings.steps, is_speaking=is_speaking) as advance, _interrupt_noted() as is_interrupted:
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
            peers=peers,
        )
    if not is_speaking:
        return
    if json_file:
        write_json(json_file, {"model": model, "options": settings.as_json(), "last": last})
    plain_console(stderr=True).print(f"written to {out}", soft_wrap=True)


@contextmanager
def _shown(steps: int, *, is_speaking: bool) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Show steps as they end; of several processes one speaks."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("finetune"), BarColumn(), TextColumn("{task.fields[text]}"), TimeRemainingColumn())
    with Progress(*columns, console=plain_console(stderr=True), disable=not is_speaking) as progress:
        task = progress.add_task("finetune", total=steps, text="reading the model")

        def advance(row: dict[str, Any]) -> None:
            moved = f"read {format_size(row['bytes_read'])}, wrote {format_size(row['bytes_written'])}"
            speed = f"{row['tokens_per_second']:.0f} tok/s"
            text = f"{row['step']}/{steps}  loss {row['loss']:.4f}  {speed}  {moved}"
            progress.update(task, completed=row["step"], text=text)

        yield advance


@contextmanager
def _interrupt_noted() -> Iterator[Callable[[], bool]]:
    """Note Ctrl-C and SIGTERM, so that the step that they come in is committed; the second one acts at once.

    Of several processes each gets both: Ctrl-C from the terminal, then SIGTERM from torchrun.
    """
    noted: list[int] = []

    def note(number: int, frame: Any) -> None:
        if number in noted:
            raise KeyboardInterrupt
        noted.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(noted)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
