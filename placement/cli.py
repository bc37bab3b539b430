"""`expertier place`: solve, score and export expert placements."""

import typer

app = typer.Typer(help="Solve where experts should live on a cluster.", no_args_is_help=True)
