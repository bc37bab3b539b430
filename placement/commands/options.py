"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

TraceOption = Annotated[Path | None, typer.Option("--trace", help="A routing trace (.npz).")]
LoadsOption = Annotated[
    list[Path] | None,
    typer.Option("--loads", help='JSON with "logical_count"; repeat it for scenarios.'),
]
RowsOption = Annotated[str | None, typer.Option("--rows", help="Only rows A:B of the trace.")]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Also write the result as JSON.")]
