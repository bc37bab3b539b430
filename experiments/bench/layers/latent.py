"""`expertier bench latent-experts`: latent experts beside ordinary ones of equal operations.

Shapes: T tokens, K slots, E experts, D model width, F expert width.
"""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from routing.ground.terminal import plain_console

from ...evidence.record import RECORDS, expect_records, save_record
from ..listed import listed
from .turns import compared

if TYPE_CHECKING:
    from torch import Tensor

# that of the preset for one CPU, and experts of its latent ones twice as wide as these, which is about equal operations
EXPERTS, TOP_K, INNER_WIDTH = 16, 2, 1024
GROUP = 4
"""The default of the architecture `latent`, as is a rank of a quarter of the width."""


def bench_latent_experts(
    tokens: Annotated[str, typer.Option(help="Tokens of a call, by commas.")] = "1,512,2048",
    width: Annotated[int, typer.Option(min=8, help="D; the rank is a quarter of it.")] = 512,
    repeats: Annotated[int, typer.Option(min=5, help="Timed passes.")] = 20,
    record: Annotated[bool, typer.Option("--record", help="Keep the result under experiments/records.")] = False,
    records: Annotated[Path, typer.Option(help="Where records live.")] = RECORDS,
) -> None:
    """Speed of latent experts (MoLAE) against ordinary experts with as many operations, forward and training.

    A speed above 1 means that latent experts are quicker.

    Example: `expertier bench latent-experts --tokens 512 --repeats 20`
    """
    expect_records(records)
    counts = listed(tokens, "--tokens")
    check_parity(width)
    rows = [measure(count, width, backward, repeats) for count in counts for backward in (False, True)]
    table = Table("T", "pass", "latent ms", "p20", "p80", "ordinary ms", "speed", "F latent", "F ordinary")
    for row in rows:
        table.add_row(
            str(row["tokens"]),
            "training" if row["backward"] else "forward",
            *(f"{row[name]:.2f}" for name in ("p50_ms", "p20_ms", "p80_ms", "plain_ms", "speed")),
            *(str(row[name]) for name in ("latent_width", "ordinary_width")),
        )
    plain_console().print(table)
    if record:
        sizes = {"experts": EXPERTS, "top_k": TOP_K, "group": GROUP, "rank": width // 4}
        config = {"width": width, "repeats": repeats, **sizes}
        typer.echo(f"record: {save_record('latent-experts', rows, config=config, folder=records)}")


def check_parity(width: int) -> None:
    """Compare latent experts with ordinary ones whose matrices are the products of theirs.

    Raises:
        RuntimeError: if outputs or a token's gradients disagree; then no time is shown.
    """
    import torch

    from moe import expertier_experts

    latent, ordinary = (part.double() for part in build_experts(width, INNER_WIDTH, INNER_WIDTH))
    with torch.no_grad():
        basis = torch.stack([latent.gate_basis, latent.up_basis], dim=1).repeat_interleave(GROUP, dim=0)
        each = latent.gate_up_proj.unflatten(1, (2, -1))
        ordinary.gate_up_proj.copy_((each @ basis).flatten(1, 2))
        ordinary.down_proj.copy_(latent.down_proj)
    x_TD, expert_TK, weight_TK = (given.double() if given.is_floating_point() else given for given in inputs(64, width))
    results = []
    for compute in (latent, partial(expertier_experts, ordinary)):
        token_TD = x_TD.detach().requires_grad_()
        y_TD = compute(token_TD, expert_TK, weight_TK)
        results.append((y_TD, *torch.autograd.grad(y_TD.square().sum(), token_TD)))
    if not all(torch.allclose(a, b, atol=1e-8, rtol=1e-6) for a, b in zip(*results, strict=True)):
        raise RuntimeError("latent experts do not compute what their multiplied matrices give; no time is shown")


def measure(tokens: int, width: int, backward: bool, repeats: int) -> dict[str, Any]:
    """One row: both kinds of experts on the same tokens and choices, in turns, as models of ours compute them."""
    import torch

    from moe import expertier_experts

    x_TD, expert_TK, weight_TK = inputs(tokens, width)
    x_TD.requires_grad_(backward)
    load_E = torch.bincount(expert_TK.flatten(), minlength=EXPERTS) / tokens
    latent, _ = build_experts(width, INNER_WIDTH, 8)
    visited = sum(len((expert_TK // GROUP)[token].unique()) for token in range(tokens)) / tokens
    operations = 2 * TOP_K * (latent.gate_up_proj[0].numel() + latent.down_proj[0].numel())
    operations += 4 * visited * latent.gate_basis[0].numel()
    ordinary_width = round(operations / (6 * width * TOP_K) / 8) * 8
    _, ordinary = build_experts(width, 8, ordinary_width)

    def call(experts: Any) -> Any:
        if experts is latent:
            return latent(x_TD, expert_TK, weight_TK)
        return expertier_experts(ordinary, x_TD, expert_TK, weight_TK)

    times = compared(latent, ordinary, call, backward, repeats)
    return {
        "tokens": tokens,
        "backward": backward,
        "width": width,
        "latent_width": INNER_WIDTH,
        "ordinary_width": ordinary_width,
        "operations_per_token": operations,
        "busiest_load": float(load_E.max()),
        **times,
        "speed": 1 / times["ratio"],
    }


def build_experts(width: int, latent_width: int, ordinary_width: int) -> tuple[Any, Any]:
    """Latent and ordinary experts with random weights."""
    import torch

    from moe import MoEConfig, build_body

    torch.manual_seed(0)
    sizes = {"hidden_size": width, "num_hidden_layers": 1, "num_experts": EXPERTS, "num_experts_per_tok": TOP_K}
    named = {"architecture": "latent", "architecture_options": {"group": GROUP, "rank": width // 4}}
    latent, ordinary = (
        build_body(MoEConfig(**sizes, **own)).layers[0].experts
        for own in (named | {"moe_intermediate_size": latent_width}, {"moe_intermediate_size": ordinary_width})
    )
    latent.init_parameters(0.02)
    for parameter in ordinary.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return latent, ordinary


def inputs(tokens: int, width: int) -> "tuple[Tensor, Tensor, Tensor]":
    """Tokens [T, D], their experts [T, K], all different, and weights [T, K]."""
    import torch

    draws = torch.Generator().manual_seed(1)
    expert_TK = torch.rand(tokens, EXPERTS, generator=draws).topk(TOP_K).indices
    return torch.randn(tokens, width, generator=draws), expert_TK, torch.rand(tokens, TOP_K, generator=draws)
