"""The commands of this package, joined: its own in order, and three of `trace`."""

import typer

from .commands.dequantise import dequantise
from .commands.generate import generate
from .commands.machine import calibrate, fit
from .commands.pack import pack
from .commands.simulate import simulate
from .commands.traces import batches, predictor, record

app = typer.Typer()
for command in (generate, pack, dequantise, fit, calibrate, simulate):
    app.command(command.__name__)(command)


def join_trace(trace_app: typer.Typer) -> None:
    """Add to `expertier trace` what needs a model or a cache."""
    for command in (record, batches, predictor):
        trace_app.command(command.__name__)(command)
