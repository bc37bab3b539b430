"""`expertier simulate`: hit rates of cache policies on a recorded trace."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from routing.ground.expect import expect_name, expect_outputs
from routing.ground.files import write_json
from routing.ground.terminal import plain_console
from routing.traces import RoutingTrace

from ..cache.catalogue import CACHES
from ..cache.simulate import DEFAULT_POLICIES, Simulated, gap_closed
from ..cache.simulate import simulate as run
from .options import JsonFile

NOTES = {
    "belady": "belady knows the future: the most that a cache can hit that starts empty and admits all that it reads",
    "static": "static keeps what the first 256 tokens used most; a set that is filled before the start can hit more",
}


def simulate(
    trace: Annotated[Path, typer.Argument(help="A routing trace (.npz).")],
    cache_experts: Annotated[
        int, typer.Option("--cache-experts", min=1, help="Experts the cache holds: in total, or of each layer.")
    ],
    per_layer: Annotated[
        bool, typer.Option("--per-layer", help="So many for each layer, as in `generate`; default: in total.")
    ] = False,
    rows: Annotated[int | None, typer.Option("--rows", min=1, help="Use the first rows of the trace.")] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option("--policy", help=f"Policy to simulate; repeat for more: {', '.join(sorted(CACHES))}."),
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Print the hit rate that each cache policy would have had on a recorded trace.

    The third column says how much of the way from LRU to Belady that is; these two are always simulated.

    Example: `expertier simulate routing.npz --cache-experts 8 --per-layer --policy lru --policy belady`
    """
    expect_outputs(json_file, inputs=[trace])
    policies = dict.fromkeys(["lru", *(policy or DEFAULT_POLICIES), "belady"])
    for name in policies:
        expect_name(name, CACHES, "cache policy")
    recorded = RoutingTrace.load(trace).rows(0, rows)
    if not recorded.num_tokens:
        raise ValueError(f"trace {trace}: it has no rows")
    _say_sizes(recorded, cache_experts, per_layer=per_layer)
    results = run(recorded, cache_experts, per_layer=per_layer, policies=list(policies))
    shares = gap_closed(results)
    _show(results, shares)
    if json_file:
        write_json(
            json_file,
            {
                "trace": str(trace),
                "rows": recorded.num_tokens,
                "cache_experts": cache_experts,
                "per_layer": per_layer,
                "policies": _as_json(results, shares),
            },
        )


def _say_sizes(recorded: RoutingTrace, cache_experts: int, *, per_layer: bool) -> None:
    """Say what the number means; warn where a cache in total cannot keep even one token's experts."""
    layers, token = recorded.num_layers, recorded.num_layers * recorded.top_k
    total = cache_experts * layers if per_layer else cache_experts
    what = f"{cache_experts} experts of each layer" if per_layer else f"{cache_experts} experts of all layers together"
    plain_console().print(
        f"{recorded.num_tokens} rows; the cache holds {what}: {total} of {layers * recorded.num_experts}",
        soft_wrap=True,
    )
    if total < token:
        hint = f"more, or --per-layer for {cache_experts} of each layer" if not per_layer else "more"
        plain_console(stderr=True).print(
            f"one token uses {token} experts ({layers} layers x {recorded.top_k}), more than the cache holds: next to "
            f"nothing is hit before it is evicted; give {hint}",
            soft_wrap=True,
        )


def _show(results: Mapping[str, Simulated], shares: Mapping[str, float | None]) -> None:
    table = Table("policy", "hit rate", "of the gap closed", "worst layer", "best layer")
    for name, result in results.items():
        worst, best = result.hit_rate_L.min(), result.hit_rate_L.max()
        share = shares[name]
        shown = "-" if share is None else f"{share:.0%}"
        table.add_row(name, f"{result.hit_rate:.4f}", shown, f"{worst:.4f}", f"{best:.4f}")
    console = plain_console()
    console.print(table)
    for name in results.keys() & NOTES.keys():
        console.print(NOTES[name], soft_wrap=True)


def _as_json(results: Mapping[str, Simulated], shares: Mapping[str, float | None]) -> dict[str, Any]:
    return {
        name: {
            "hit_rate": result.hit_rate,
            "gap_closed": shares[name],
            "hits": int(result.hits_L.sum()),
            "accesses": int(result.accesses_L.sum()),
            "hit_rate_L": result.hit_rate_L.tolist(),
        }
        for name, result in results.items()
    }
