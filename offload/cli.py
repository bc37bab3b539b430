"""The commands of this package (`generate`, `chat`, `serve`, `finetune`, `pack`, `fit`, ...) and some of `trace`."""

import typer

from .commands.chat import chat
from .commands.dequantise import dequantise
from .commands.generate import generate
from .commands.low_bit.quality import quality
from .commands.machine import calibrate, fit
from .commands.pack import pack
from .commands.processes import Processes, join_processes
from .commands.serve import serve
from .commands.simulate import simulate
from .commands.tracing.neurons import neurons
from .commands.tracing.routing import batches, predictor, record
from .commands.tuning.finetune import finetune

__all__ = ["Processes", "app", "join_processes", "join_trace"]

app = typer.Typer()
for command in (generate, chat, serve, finetune, pack, dequantise, quality, fit, calibrate, simulate):
    app.command(command.__name__)(command)


def join_trace(trace_app: typer.Typer) -> None:
    """Add to `expertier trace` what needs a model or a cache."""
    for command in (record, batches, predictor, neurons):
        trace_app.command(command.__name__)(command)
