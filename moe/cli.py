"""The commands of this package, joined: `export`, `convert`, `refactor`, `upcycle`, `prune`, `join` and others."""

import typer

from .conversion.bricks.command import bricks
from .conversion.commands import convert, export
from .conversion.dense_to_experts.command import refactor
from .conversion.merging.command import merge
from .conversion.opening import join_plain_copy
from .conversion.prune_and_join_commands import join, prune
from .conversion.upcycling.command import upcycle

__all__ = ["app", "join_plain_copy"]

app = typer.Typer(pretty_exceptions_enable=False)
for command in (export, convert, refactor, upcycle, prune, join, merge, bricks):
    app.command()(command)
