"""`expertier place`: the commands of this package, joined."""

import typer

from .commands.check import check_command
from .commands.engines import export_command, import_command, loads_command
from .commands.machines import cluster_command, speeds_command
from .commands.migrate import migrate_command
from .commands.one_machine import part_command, tiers_command
from .commands.score import report_command, score_command
from .commands.solve import solve_command

app = typer.Typer(help="Solve where experts should live on a cluster.", no_args_is_help=True)
app.command("solve")(solve_command)
app.command("score")(score_command)
app.command("check")(check_command)
app.command("cluster")(cluster_command)
app.command("export")(export_command)
app.command("import")(import_command)
app.command("loads")(loads_command)
app.command("migrate")(migrate_command)
app.command("speeds")(speeds_command)
app.command("tiers")(tiers_command)
app.command("part")(part_command)
app.command("report")(report_command)
