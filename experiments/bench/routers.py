"""`expertier bench routers`: what a router costs per layer, against the least that top-k routing can cost in torch."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from routing.ground.terminal import plain_console

from ..evidence.record import RECORDS, expect_records, save_record

# those of the record router-overhead; with 8 layers, most have the state of a layer before them
TOKENS, WIDTH, EXPERTS, TOP_K, LAYERS = 4096, 512, 64, 8, 8
# times the plain gate, as that record expected before it was measured (1.3 and 2)
LIMITS = {"classic": 1.3, "rmoe": 2.0}
PLAIN, PRODUCTS = "linear + softmax + topk", "rmoe's products alone"
MEASURED = ("classic", "mixtral", "deepseek_v3", "rmoe", "moepp", "xmoe", "pregate", "remoe", "expert_choice")


def routers(
    repeats: Annotated[int, typer.Option(min=5, help="Timed passes; each runs every contestant once.")] = 30,
    record: Annotated[bool, typer.Option("--record", help="Keep the result under experiments/records.")] = False,
    records: Annotated[Path, typer.Option(help="Where records live.")] = RECORDS,
) -> None:
    """Time routers per layer at T=4096, D=512, E=64, K=8 on the CPU, forward only, after checking their choices.

    Example: `expertier bench routers --repeats 30`
    """
    expect_records(records)
    rows = measure(repeats)
    table = Table("router", "ms per layer", "p20", "p80", "times linear + softmax + topk", "limit")
    for row in rows:
        limit = LIMITS.get(row["router"])
        table.add_row(
            row["router"],
            f"{row['p50_ms']:.2f}",
            f"{row['p20_ms']:.2f}",
            f"{row['p80_ms']:.2f}",
            f"{row['ratio']:.2f}",
            "" if limit is None else f"{limit:.1f}",
        )
    plain_console().print(table)
    if record:
        config = {"tokens": TOKENS, "width": WIDTH, "experts": EXPERTS, "top_k": TOP_K, "repeats": repeats}
        typer.echo(f"record: {save_record('router-overhead', rows, config=config, folder=records)}")


def measure(repeats: int) -> list[dict[str, Any]]:
    """Per contestant, milliseconds per layer and the ratio to the plain product, softmax and top-k.

    Contestants take turns within each pass, so that a slow spell of the machine hits all of them.

    Raises:
        RuntimeError: if the classic router does not choose what the plain code chooses.
    """
    import torch

    x_LTD = torch.randn(LAYERS, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))
    contestants = {PLAIN: _plain(x_LTD), PRODUCTS: _products(x_LTD)}
    contestants |= {name: _contestant(name, x_LTD) for name in MEASURED}
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    with torch.no_grad():
        for number in range(repeats + 3):
            for name, run in contestants.items():
                start = time.perf_counter()
                run()
                if number >= 3:
                    samples[name].append((time.perf_counter() - start) * 1e3 / LAYERS)
    return [_row(name, values, samples[PLAIN]) for name, values in samples.items()]


def _plain(x_LTD: Any) -> Callable[[], None]:
    import torch

    weights = [router.weight for router in _build("classic")]

    def run() -> None:
        for x_TD, weight in zip(x_LTD, weights, strict=True):
            torch.nn.functional.linear(x_TD, weight).softmax(dim=-1).topk(TOP_K, dim=-1)

    return run


def _products(x_LTD: Any) -> Callable[[], None]:
    """RMoE's matrix products into memory that is there already: no gate, no softmax, no choice."""
    import torch

    routers = _build("rmoe")
    cell = routers[0].cell
    p = cell.hidden_size
    projected, state, hidden, score = (x_LTD.new_empty(TOKENS, width) for width in (p, p, 3 * p, EXPERTS))
    state.normal_()

    def run() -> None:
        for router, x_TD in zip(routers, x_LTD, strict=True):
            torch.mm(x_TD, router.projection.T, out=projected)
            torch.mm(projected, cell.weight_ih.T, out=hidden)
            if router.layer:
                torch.mm(state, cell.weight_hh.T, out=hidden)
            torch.mm(state, router.weight.T, out=score)

    return run


def _contestant(name: str, x_LTD: Any) -> Callable[[], None]:
    import torch

    from routing import RoutingContext

    routers = _build(name)
    context = RoutingContext()
    if name == "classic":
        routing, _, _ = routers[0](x_LTD[0], routers[0].begin(context), context)
        expected = (x_LTD[0] @ routers[0].weight.T).softmax(dim=-1).topk(TOP_K, dim=-1)
        if not torch.equal(routing.expert_TK, expected.indices):
            raise RuntimeError("the classic router does not choose what the plain code chooses; no time is shown")
        torch.testing.assert_close(routing.weight_TK, expected.values)

    def run() -> None:
        carry = routers[0].begin(context)
        for router, x_TD in zip(routers, x_LTD, strict=True):
            _, carry, _ = router(x_TD, carry, context)

    return run


def _build(name: str) -> list[Any]:
    import torch

    from routing import RouterSizes, build_routers

    torch.manual_seed(0)
    zero_compute = ("zero", "copy", "constant") if name == "moepp" else ()
    sizes = RouterSizes(
        width=WIDTH, num_experts=EXPERTS, top_k=TOP_K, num_layers=LAYERS, zero_compute=zero_compute, vocab_size=256
    )
    routers = build_routers(name, sizes)
    for router in routers:
        for module in router.modules():
            if hasattr(module, "init_parameters"):
                module.init_parameters(0.02)
        router.eval()
    return routers


def _row(name: str, values: list[float], plain: list[float]) -> dict[str, Any]:
    deciles = statistics.quantiles(values, n=10)
    return {
        "router": name,
        "p20_ms": deciles[1],
        "p50_ms": statistics.median(values),
        "p80_ms": deciles[7],
        "n": len(values),
        "ratio": statistics.median(value / base for value, base in zip(values, plain, strict=True)),
    }
