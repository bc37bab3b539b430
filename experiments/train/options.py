"""Options that `expertier train`, `compare` and `sweep` share."""

from pathlib import Path
from typing import Annotated

import typer

DataOption = Annotated[
    str | None, typer.Option(help="Text file, .jsonl, .parquet, or a folder; default: the standard library.")
]
ColumnOption = Annotated[str | None, typer.Option(help="Text column of a table; default: text.")]
TokenizerOption = Annotated[
    str | None, typer.Option(help="Folder of a Hugging Face tokenizer, or its tokenizer.json; default: bytes.")
]
ConfigOption = Annotated[
    Path | None, typer.Option("--config", help="Description of a run (YAML), such as the run.yaml of a finished one.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="A setting, such as model.num_experts=64 or learning_rate=2e-3; may be repeated."),
]
StepsOption = Annotated[int | None, typer.Option(min=1, help="Optimiser steps; default: from the preset.")]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Also write the report there.")]
ProcessesOption = Annotated[int, typer.Option(min=1, help="Runs at a time on one machine; they share its cores.")]
EngineOption = Annotated[
    str, typer.Option(metavar="local|ray", help="Who trains: this machine, or the machines of a Ray cluster.")
]
