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
    from routing.ground.quantity import format_size
    from routing.ground.terminal import plain_console

    from ..contract.plan import Plan
    from ..solving.elastic import migrate_checked

    expect_outputs(out, plan_out, inputs=[current, target])
    found = migrate_checked(Plan.load(current), Plan.load(target))
    write_json(out, found.to_json())
    if plan_out:
        found.plan.save(plan_out)
    is_known = found.plan.cluster.model.bytes_per_expert is not None
    moved, crossing, extra = (
        format_size(value) if is_known else f"{value:.0f} experts"
        for value in (found.moved_bytes, found.node_crossing_bytes, found.peak_extra_bytes)
    )
    unknown = "" if is_known else " (sizes unknown: model.expert_bytes is not in the cluster)"
    plain_console().print(
        f"wrote {out}: {len(found.steps)} steps, {moved} moved ({crossing} between nodes), "
        f"{extra} extra at most{unknown}",
        highlight=False,
    )
