"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(help="A Hugging Face model folder (safetensors) or a model id.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Also write the report as JSON.")]
CpuMemory = Annotated[
    str, typer.Option("--cpu-memory", help="Budget for everything the process has in RAM, such as 6GiB.")
]
GpuMemory = Annotated[str, typer.Option("--gpu-memory", help="Budget for everything on the GPU, such as 8GiB.")]
CacheExperts = Annotated[
    int | None, typer.Option("--cache-experts", help="RAM slots per MoE layer, instead of what the budget pays for.")
]
Policy = Annotated[str, typer.Option("--policy", help="Which expert leaves the cache when another needs its slot.")]


def expect_folder(file: Path | None) -> None:
    """Refuse an output file whose folder does not exist, before any work is done."""
    if file is not None and not file.absolute().parent.is_dir():
        raise ValueError(f"cannot write {file}: the folder {file.absolute().parent} does not exist; create it first")


def quiet_transformers() -> None:
    """Silence transformers' warnings and progress bars: the command prints its own."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
