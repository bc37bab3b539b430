"""Options that `expertier train` and `compare` share."""

from pathlib import Path
from typing import Annotated

import typer

DataOption = Annotated[
    str | None, typer.Option(help="Text file, .jsonl, .parquet, or a folder; default: the standard library.")
]
TokenizerOption = Annotated[
    str | None, typer.Option(help="Folder of a Hugging Face tokenizer, or its tokenizer.json; default: bytes.")
]
StepsOption = Annotated[int | None, typer.Option(min=1, help="Optimiser steps; default: from the preset.")]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Also write the report there.")]
