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
    chunk_bytes: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Cut the steps into chunks that move at most so much, as 2GiB.")
    ] = None,
    stall: Annotated[
        str | None, typer.Option(metavar="TIME", help="Cut the steps into chunks of at most such a time, as 50ms.")
    ] = None,
) -> None:
    """Order the transfers from one plan to another so that every expert always has a live copy.

    Example: `expertier place migrate plan32.json plan40.json --out steps.json --plan-out plan40b.json`
    """
    from routing.ground.files import write_json
    from routing.ground.quantity import format_size, parse_bytes, parse_seconds
    from routing.ground.terminal import plain_console

    from ..contract.plan import Plan
    from ..solving.chunks import cut
    from ..solving.elastic import migrate_checked

    expect_outputs(out, plan_out, inputs=[current, target])
    running = Plan.load(current)
    found = migrate_checked(running, Plan.load(target))
    report = found.to_json()
    chunks = None
    if chunk_bytes is not None or stall is not None:
        budget = {} if chunk_bytes is None else {"most_bytes": parse_bytes(chunk_bytes)}
        chunks = cut(running, found, **budget, **({} if stall is None else {"most_seconds": parse_seconds(stall)}))
        report["chunks"] = [chunk.to_json() for chunk in chunks]
    write_json(out, report)
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
    if chunks:
        longest, most = max(chunk.seconds for chunk in chunks), max(chunk.bytes for chunk in chunks)
        plain_console().print(
            f"{len(chunks)} chunks; the longest stalls {longest * 1e3:.3g} ms for {format_size(most)}",
            highlight=False,
        )
