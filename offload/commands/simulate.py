"""`expertier simulate`: hit rates of cache policies on a recorded trace."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from routing.ground.files import write_json
from routing.traces import RoutingTrace

from .options import JsonFile, expect_folder


def simulate(
    trace: Annotated[Path, typer.Argument(help="A routing trace (.npz).")],
    cache_experts: Annotated[int, typer.Option("--cache-experts", min=1, help="Experts the cache holds.")],
    per_layer: Annotated[bool, typer.Option("--per-layer", help="That many for each layer, not in total.")] = False,
    rows: Annotated[int | None, typer.Option("--rows", min=1, help="Only the first rows of the trace.")] = None,
    policy: Annotated[list[str] | None, typer.Option("--policy", help="Policy to simulate; repeat for more.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Print the hit rate that each cache policy would have had on a recorded trace, and how much of the way from LRU to
    Belady that is; these two are always simulated.

    Example: `expertier simulate routing.npz --cache-experts 8 --per-layer --policy lru --policy belady`
    """
    from ..cache.simulate import DEFAULT_POLICIES, gap_closed
    from ..cache.simulate import simulate as run

    expect_folder(json_file)
    recorded = RoutingTrace.load(trace).rows(0, rows)
    policies = dict.fromkeys(["lru", *(policy or DEFAULT_POLICIES), "belady"])
    results = run(recorded, cache_experts, per_layer=per_layer, policies=list(policies))
    shares = gap_closed(results)
    table = Table("policy", "hit rate", "of the gap closed", "worst layer", "best layer")
    for name, result in results.items():
        worst, best = result.hit_rate_L.min(), result.hit_rate_L.max()
        share = "-" if shares[name] is None else f"{shares[name]:.0%}"
        table.add_row(name, f"{result.hit_rate:.4f}", share, f"{worst:.4f}", f"{best:.4f}")
    Console().print(table)
    if json_file:
        write_json(
            json_file,
            {
                "trace": str(trace),
                "rows": recorded.num_tokens,
                "cache_experts": cache_experts,
                "per_layer": per_layer,
                "policies": {
                    name: {
                        "hit_rate": result.hit_rate,
                        "gap_closed": shares[name],
                        "hits": int(result.hits_L.sum()),
                        "accesses": int(result.accesses_L.sum()),
                        "hit_rate_L": result.hit_rate_L.tolist(),
                    }
                    for name, result in results.items()
                },
            },
        )
