"""A pass through all layers of a plan in which tokens stay where their experts are, beside one that brings them home.

Each layer adds its experts' sum to the hidden states and divides by their root mean square, so that a layer sees what
the layers before it computed. There is no attention: keys and values are counted, not sent.

Shapes: T rows of a trace, D model width, N rows of tokens on this process, G processes.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed

from moe.parallel import Here, go_on
from placement import Plan
from routing.traces import RoutingTrace

from .staying import Crossed, RowBytes, Turns, homecomings, passed
from .work import Layer, Size, gathered, relative, source_T, tokens

FLOAT_BYTES, ID_BYTES = 4, 4
"""Of entries and weights, and of ids and numbers, as they travel."""


@dataclass(kw_only=True)
class _Pass:
    """One way through the layers, as this process sees it.

    Args:
        is_home_L: after which layers tokens come home.
        here: the tokens of this process.
    """

    is_home_L: list[bool]
    here: Here
    table_L2G: list[Tensor] = field(default_factory=list)
    moves: int = 0

    def through(self, layer: Layer, home_T: Tensor) -> None:
        """Go through the next layer."""
        here, rank, G = self.here, distributed.get_rank(), distributed.get_world_size()
        expert_NK, weight_NK = layer.routed(here.number_N.numpy())
        rank_NK, local_NK = layer.placed.copies.place(expert_NK)
        next_N = home_T[here.number_N]
        if not self.is_home_L[len(self.table_L2G)]:
            next_N = _stays(rank_NK, rank, G)
        self.moves += int((next_N != rank).sum())
        self.here, crossing = go_on(
            *(here, rank_NK, local_NK, weight_NK, next_N, layer.placed.compute, follow, distributed.group.WORLD),
            empty_id=layer.placed.copies.slots,
        )
        self.table_L2G.append(torch.stack([crossing.there_G, crossing.on_G]))


def _stays(rank_NK: Tensor, rank: int, processes: int) -> Tensor:
    """Where tokens go on: here if one of their experts is, else where most are, the first of several."""
    slots_NG = torch.zeros(len(rank_NK), processes + 1, dtype=torch.int64)
    slots_NG.scatter_add_(1, rank_NK, torch.ones_like(rank_NK))
    slots_NG = slots_NG[:, :processes]
    is_here_N = (slots_NG[:, rank] > 0) | (slots_NG.sum(dim=1) == 0)
    return torch.where(is_here_N, rank, slots_NG.argmax(dim=1))


def follow(x_ND: Tensor, sum_ND: Tensor) -> Tensor:
    """Hidden states of the next layer."""
    return torch.nn.functional.rms_norm(x_ND + sum_ND, x_ND.shape[1:])


@torch.no_grad()
def stay_and_return(plan: Plan, trace: RoutingTrace, size: Size, context_width: int) -> dict[str, Any]:
    """Pass a trace through a plan twice; all processes call this together.

    Args:
        plan: where the experts are.
        trace: what is routed.
        size: of experts and tokens.
        context_width: entries of the keys and values of a token in one layer.

    Returns:
        `home_after` (layers), `context_bytes`, `error` (largest, against whole experts), and for `home` and `staying`
        each `predicted` and `counted`: `rows`, `bytes` and `moves`; `is_equal`: whether all of them are.
    """
    G, rank, L = distributed.get_world_size(), distributed.get_rank(), plan.num_layers
    source = source_T(trace, G)
    row = RowBytes(
        there=size.width * FLOAT_BYTES + trace.top_k * (ID_BYTES + FLOAT_BYTES) + 2 * ID_BYTES,
        on=size.width * FLOAT_BYTES + ID_BYTES,
        context=context_width * FLOAT_BYTES,
    )
    turns_L = [Turns.of(Layer.turns_of(plan, number, trace, G)) for number in range(L)]
    ways = {
        "home": [True] * L,
        "staying": homecomings(turns_L, trace.expert_TLK, source, row),
    }
    forecasts = {name: passed(turns_L, trace.expert_TLK, source, is_home_L) for name, is_home_L in ways.items()}
    number_N, x_TD = torch.from_numpy(np.flatnonzero(source == rank)), tokens(trace, size)
    start = Here(number_N=number_N, x_ND=x_TD[number_N])
    passes = {name: _Pass(is_home_L=is_home_L, here=start) for name, is_home_L in ways.items()}
    right_ND, home_T = start.x_ND, torch.from_numpy(source)
    for number in range(L):
        layer = Layer(plan, number, trace, size, G)
        for one in passes.values():
            one.through(layer, home_T)
        if len(number_N):
            right_ND = follow(right_ND, layer.whole(right_ND, *layer.routed(number_N.numpy())))
    error = max(relative(one.here.x_ND, right_ND) for one in passes.values())
    is_there = all(torch.equal(one.here.number_N, number_N) for one in passes.values())
    worst = gathered(torch.tensor([error if is_there else np.inf])).max()
    found: dict[str, Any] = {
        "home_after": [layer for layer, is_home in enumerate(ways["staying"]) if is_home],
        "context_bytes": forecasts["staying"][1] * (G - 1) * row.context,
        "error": float(worst),
    }
    is_equal = True
    for name, one in passes.items():
        predicted, counted = forecasts[name][0], _counted(one)
        is_equal &= all(
            (a.there_GG == b.there_GG).all() and (a.on_GG == b.on_GG).all()
            for a, b in zip(predicted, counted, strict=True)
        )
        moves = int(gathered(torch.tensor([one.moves])).sum())
        found[name] = {
            "predicted": _summary(predicted, row, sum(layer.moves for layer in predicted)),
            "counted": _summary(counted, row, moves),
        }
        is_equal &= found[name]["predicted"] == found[name]["counted"]
    return found | {"is_equal": bool(is_equal)}


def _counted(one: _Pass) -> list[Crossed]:
    table_GL2G = gathered(torch.stack(one.table_L2G)).numpy()
    return [
        Crossed(there_GG=table_GL2G[:, layer, 0], on_GG=table_GL2G[:, layer, 1], moves=0)
        for layer in range(table_GL2G.shape[1])
    ]


def _summary(layers: list[Crossed], row: RowBytes, moves: int) -> dict[str, int]:
    return {
        "rows": sum(layer.rows for layer in layers),
        "bytes": sum(layer.nbytes(row) for layer in layers),
        "moves": moves,
    }
