"""`expertier place migrate`: the ordered transfers from one plan to another."""

from pathlib import Path
from typing import Annotated

import typer

from routing.ground.expect import expect_outputs


def migrate_command(
    current: Annotated[Path, typer.Argument(help="The plan that runs now.")],
    target: Annotated[Path, typer.Argument(help="The plan to go to; it may have more or fewer GPUs.")],
    out: Annotated[Path, typer.Option("--out", help="Where the ordered steps go (JSON).")],
    plan_out: Annotated[Path | None, typer.Option(help="Where the target with its GPUs renumbered goes.")] = None,
) -> None:
    """Order the transfers from one plan to another so that every expert always has a live copy.

    Example: `expertier place migrate plan32.json plan40.json --out steps.json --plan-out plan40b.json`
    """
    from routing.ground.files import write_json
    from routing.ground.terminal import plain_console

    from ..contract.plan import Plan
    from ..solving.elastic import migrate, replay

    expect_outputs(out, plan_out, inputs=[current, target])
    running = Plan.load(current)
    found = migrate(running, Plan.load(target))
    for _ in replay(running, found):
        pass
    steps = [{"kind": type(step).__name__.lower(), **vars(step)} for step in found.steps]
    totals = {name: getattr(found, name) for name in ("moved_bytes", "node_crossing_bytes", "peak_extra_bytes")}
    write_json(out, {**totals, "steps": steps})
    if plan_out:
        found.plan.save(plan_out)
    plain_console().print(
        f"wrote {out}: {len(steps)} steps, {found.moved_bytes / 1e9:.3g} GB moved "
        f"({found.node_crossing_bytes / 1e9:.3g} GB between nodes), "
        f"{found.peak_extra_bytes / 1e6:.3g} MB extra at most",
        highlight=False,
    )
