"""The commands of this package, joined: `export`, `convert`, `refactor`, `prune`, `join`, `bricks`."""

import typer

from .conversion.bricks.command import bricks
from .conversion.commands import convert, export
from .conversion.dense_to_experts.command import refactor
from .conversion.prune_and_join_commands import join, prune

app = typer.Typer(pretty_exceptions_enable=False)
for command in (export, convert, refactor, prune, join, bricks):
    app.command()(command)
