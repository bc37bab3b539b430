"""`expertier bench memory-layers`: PEER and UltraMemV2 beside a dense feed-forward of equal operations."""

from math import isqrt
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from routing.ground.terminal import plain_console

from ...evidence.record import RECORDS, expect_records, save_record
from ..listed import listed
from .turns import compared, pass_through

# Experts per token and heads of the layers that are timed. PEER's 8 heads and 16 experts per
# head are the paper's (arXiv:2407.04153); the other widths suit the default model width of 128.
SETTINGS: dict[str, dict[str, Any]] = {
    "peer": {"num_experts_per_tok": 16, "options": {"num_heads": 8, "key_width": 128, "query_norm": "layer"}},
    "ultramem": {
        "num_experts_per_tok": 32,
        "options": {"num_heads": 1, "key_width": 128, "pre_value_width": 64, "value_width": 192, "expand": 2},
    },
}
# one decoded token, and a prompt or a small batch
TOKENS = (1, 512)


def bench_memory_layers(
    experts: Annotated[
        str, typer.Option(help="Numbers of experts, squares, by commas.")
    ] = "4096,16384,65536,262144,1000000",
    width: Annotated[int, typer.Option(help="D; at a million experts PEER's tables take 8 MB per unit of it.")] = 128,
    train_up_to: Annotated[int, typer.Option(help="Time the backward pass up to so many experts.")] = 262_144,
    repeats: Annotated[int, typer.Option(min=5, help="Timed passes.")] = 30,
    record: Annotated[bool, typer.Option("--record", help="Keep the result under experiments/records.")] = False,
    records: Annotated[Path, typer.Option(help="Where records live.")] = RECORDS,
) -> None:
    """Time and memory of a memory layer as its experts grow, beside a dense feed-forward with as many operations.

    Example: `expertier bench memory-layers --experts 65536,1000000 --repeats 20`
    """
    expect_records(records)
    counts = listed(experts, "--experts")
    if odd := [count for count in counts if isqrt(count) ** 2 != count]:
        raise ValueError(f"--experts takes squares, because keys lie on a square grid; got {odd[0]}")
    for name in SETTINGS:
        check_parity(name, width)
    rows = [row for name in SETTINGS for count in counts for row in measure(name, count, width, train_up_to, repeats)]
    table = Table("layer", "experts", "T", "ms", "p20", "p80", "dense ms", "ratio", "work MB", "tables MB")
    for row in rows:
        table.add_row(
            f"{row['layer']}{', train' if row['backward'] else ''}",
            f"{row['experts']:,}",
            str(row["tokens"]),
            *(f"{row[name]:.2f}" for name in ("p50_ms", "p20_ms", "p80_ms", "plain_ms", "ratio")),
            f"{row['working_bytes'] / 1e6:.1f}",
            f"{row['table_bytes'] / 1e6:.0f}",
        )
    plain_console().print(table)
    if record:
        config = {"width": width, "settings": SETTINGS, "repeats": repeats, "train_up_to": train_up_to}
        typer.echo(f"record: {save_record('memory-layers', rows, config=config, folder=records)}")


def check_parity(name: str, width: int) -> None:
    """Compare the layer with one that scores every place of the grid at once.

    Raises:
        RuntimeError: if they disagree; then no time is shown.
    """
    import torch

    from routing import Carry, RoutingContext

    layer = build_layer(name, 1024, width).double()
    x_TD = torch.randn(8, width, generator=torch.Generator().manual_seed(1)).double()
    with torch.no_grad():
        ours, _, _ = layer(x_TD, Carry(), RoutingContext())
        plain = {"peer": _peer_at_once, "ultramem": _ultramem_at_once}[name](layer, x_TD)
    if not torch.allclose(ours, plain, atol=1e-9, rtol=1e-7):
        raise RuntimeError(f"{name} does not compute what scoring every expert gives; no time is shown")


def measure(name: str, num_experts: int, width: int, train_up_to: int, repeats: int) -> list[dict[str, Any]]:
    """One row per number of tokens, and for many tokens one with the backward pass."""
    layer = build_layer(name, num_experts, width)
    dense, inner_width = _dense(layer, width)
    cases = [(tokens, False) for tokens in TOKENS]
    if num_experts <= train_up_to:
        cases.append((TOKENS[-1], True))
    return [
        {"layer": name, "experts": num_experts, "width": width, "dense_inner_width": inner_width}
        | _compare(layer, dense, width, tokens, backward, repeats)
        for tokens, backward in cases
    ]


def build_layer(name: str, num_experts: int, width: int) -> Any:
    """One memory layer with random weights, in evaluation mode."""
    import torch

    from moe import MoEConfig, build_body

    torch.manual_seed(0)
    config = MoEConfig(
        hidden_size=width,
        num_hidden_layers=1,
        num_experts=num_experts,
        num_experts_per_tok=SETTINGS[name]["num_experts_per_tok"],
        architecture=name,
        architecture_options=SETTINGS[name]["options"],
    )
    layer = build_body(config).layers[0].eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.02)
    layer.router.init_parameters(0.02)
    return layer


def _dense(layer: Any, width: int) -> tuple[Any, int]:
    """A feed-forward network whose matrices take as many operations per token as the layer, router and all."""
    from moe import FeedForward

    own = layer.flops([], 1.0)
    matrices = sum(2 * p.numel() for p in layer.router.parameters() if p.ndim == 2)
    inner_width = max(1, round((own.experts + own.shared + matrices + layer.router.key_flops) / (6 * width)))
    return FeedForward(width, inner_width, "silu").eval(), inner_width


def _compare(layer: Any, dense: Any, width: int, tokens: int, backward: bool, repeats: int) -> dict[str, Any]:
    import torch

    from routing import Carry, RoutingContext

    from ...evidence.live_bytes import LiveBytes

    x_TD = torch.randn(tokens, width, generator=torch.Generator().manual_seed(1), requires_grad=backward)

    def call(module: Any) -> Any:
        return layer(x_TD, Carry(), RoutingContext())[0] if module is layer else dense(x_TD)

    with LiveBytes() as live:
        pass_through(layer, call, backward)()
    table_bytes = sum(p.numel() * p.element_size() for p in layer.experts.parameters())
    return {
        "tokens": tokens,
        "backward": backward,
        **compared(layer, dense, call, backward, repeats),
        # gradients of the tables are as large as the tables, and are not seen: numpy allocates them
        "working_bytes": live.peak,
        "table_bytes": table_bytes,
    }


def _peer_at_once(layer: Any, x_TD: Any) -> Any:
    import torch

    router = layer.router
    query = (x_TD @ router.query.T).unflatten(-1, (router.num_heads, -1))
    query = torch.nn.functional.layer_norm(query, query.shape[-1:]).unflatten(-1, (2, -1))
    row, column = (query[:, :, half] @ router.keys[half].T for half in (0, 1))
    score = (row[..., :, None] + column[..., None, :]).flatten(-2)
    best = score.topk(router.sizes.top_k, dim=-1)
    neuron = torch.einsum("td,thkd->thk", x_TD, layer.experts.down[best.indices])
    weight = best.values.softmax(dim=-1) * layer.act_fn(neuron)
    return torch.einsum("thk,thkd->td", weight, layer.experts.up[best.indices])


def _ultramem_at_once(layer: Any, x_TD: Any) -> Any:
    import torch

    router, table, k = layer.router, layer.experts, layer.router.sizes.top_k
    half = router.half_width
    query = (x_TD @ router.query.T).unflatten(-1, (router.num_heads, 2, router.ranks, half))
    query = torch.nn.functional.rms_norm(query, (half,), router.query_gain, 1e-6)
    keys = torch.nn.functional.rms_norm(router.keys, (half,), router.key_gain, 1e-6)
    row, column = (torch.einsum("thra,rma->thrm", query[:, :, side], keys[side]) for side in (0, 1))
    u, v = router.proxy(x_TD.dtype)
    grid = torch.einsum("thrm,crs,thsn->thcmn", row, router.core, column)
    is_row = _is_best(torch.einsum("r,thrm->thm", u, row), k)
    is_column = _is_best(torch.einsum("r,thrm->thm", v, column), k)
    allowed = (is_row[..., :, None] & is_column[..., None, :]).flatten(-2)
    place = grid.sum(dim=2).flatten(-2).masked_fill(~allowed, -torch.inf).topk(k, dim=-1).indices
    score = grid.flatten(-2).gather(-1, place[:, :, None].expand(-1, -1, len(router.core), -1))
    value = layer.value_rows(place)
    gate = torch.einsum("td,thkd->thk", layer.pre_proj(x_TD), table.pre_values[value])
    parts = torch.einsum("thck,thk,cthkd->tcd", score, gate, torch.stack(list(table.values))[:, value])
    return layer.out_proj(parts.flatten(1))


def _is_best(score: Any, k: int) -> Any:
    import torch

    return torch.zeros_like(score, dtype=torch.bool).scatter(-1, score.topk(k, dim=-1).indices, True)
