"""`expertier place migrate`: the ordered transfers from one plan to another."""

from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from routing.ground.expect import expect_outputs

if TYPE_CHECKING:
    from ..solving.chunks import Chunk

MOST = 0.9  # of the gain in balance: where a migration may well stop


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
    chunks_done: Annotated[
        int | None,
        typer.Option("--chunks", min=1, help="Stop after so many chunks; --plan-out is the plan that then runs."),
    ] = None,
) -> None:
    """Order the transfers from one plan to another so that every expert always has a live copy.

    Example: `expertier place migrate plan32.json plan40.json --out steps.json --plan-out plan40b.json`
    """
    from routing.ground.files import write_json
    from routing.ground.quantity import format_size, parse_bytes, parse_seconds
    from routing.ground.terminal import plain_console

    from ..contract.plan import Plan
    from ..solving.chunks import cut, stop_after
    from ..solving.elastic import migrate_checked

    expect_outputs(out, plan_out, inputs=[current, target])
    if chunks_done is not None and chunk_bytes is None and stall is None:
        raise ValueError("--chunks counts chunks; say how large they may be by --stall or --chunk-bytes")
    running = Plan.load(current)
    found = migrate_checked(running, Plan.load(target))
    chunks: list[Chunk] = []
    if chunk_bytes is not None or stall is not None:
        budget = {} if chunk_bytes is None else {"most_bytes": parse_bytes(chunk_bytes)}
        chunks = cut(running, found, **budget, **({} if stall is None else {"most_seconds": parse_seconds(stall)}))
    if chunks_done is not None and chunks:
        chunks = chunks[:chunks_done]
        found = stop_after(running, found, chunks)
    write_json(out, {**found.to_json(), **({"chunks": [chunk.to_json() for chunk in chunks]} if chunks else {})})
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
            f"{len(chunks)} chunks; the longest stalls {longest * 1e3:.3g} ms for {format_size(most)}{_early(chunks)}",
            highlight=False,
        )


def _early(chunks: "list[Chunk]") -> str:
    """How soon most of the balance is gained; nothing where loads are not known."""
    gained = list(accumulate(chunk.gain for chunk in chunks))
    if gained[-1] <= 0:
        return ""
    enough = next(count for count, gain in enumerate(gained, 1) if gain >= MOST * gained[-1])
    sent = sum(chunk.bytes for chunk in chunks[:enough]) / max(sum(chunk.bytes for chunk in chunks), 1e-300)
    return f"; the first {enough}, with {sent:.0%} of the bytes, bring {MOST:.0%} of the balance gained"
