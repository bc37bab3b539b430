"""The experts of a plan on processes: rows of a trace through every layer, counted and compared with whole experts.

The experts' weights and the tokens are drawn from a seed: what is moved depends on the routing alone, which is the
trace's. Every process also computes its own tokens with whole experts, so that outputs are known to be right.

Shapes: T rows of a trace, L layers, K experts per token, E experts, D model width, F expert width, G processes.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed

from moe import Experts, MoEConfig
from moe.parallel import Copies, PlacedExperts
from placement import Plan
from routing.traces import RoutingTrace, load_LE

from .forecast import Moved
from .turns import held_by, turns_EG


@dataclass(frozen=True, kw_only=True)
class Size:
    """What a trace does not say.

    Args:
        width: D, entries of a token.
        inner_width: F of every expert.
        rows_per_call: most tokens that a process routes at a time.
        seed: of weights and tokens.
    """

    width: int = 64
    inner_width: int = 32
    rows_per_call: int = 2048
    seed: int = 0


def source_T(trace: RoutingTrace, processes: int) -> NDArray[np.int64]:
    """The process of each row: sequence i is on i mod G, as `place score` has it; with few sequences row i is."""
    is_enough = len(np.unique(trace.sequence_T)) >= processes
    return (trace.sequence_T.astype(np.int64) if is_enough else np.arange(trace.num_tokens)) % processes


def calls_of(source: NDArray[np.int64], processes: int, rows_per_call: int) -> list[list[NDArray[np.int64]]]:
    """Per process the rows of each of its calls; all make equally many, some of no rows."""
    rows = [np.flatnonzero(source == rank) for rank in range(processes)]
    count = max(1, -(-max(map(len, rows)) // rows_per_call))
    return [[own[turn * rows_per_call : (turn + 1) * rows_per_call] for turn in range(count)] for own in rows]


class Layer:
    """One layer of a plan, as one process has it.

    Args:
        plan: where its experts are.
        number: the layer, among those of the trace.
        trace: its loads decide quotas.
        size: of experts and tokens.
        processes: how many there are, at least as many as the plan has GPUs.
        rows: as for `moe.parallel.PlacedExperts`.
    """

    def __init__(
        self, plan: Plan, number: int, trace: RoutingTrace, size: Size, processes: int, *, rows: str = "rank"
    ) -> None:
        self.plan, self.number, self.trace, self._size = plan, number, trace, size
        self.held = held_by(plan, number, processes)
        self._load_E = _load_E(plan, number, trace)
        self.placed = PlacedExperts(
            self._drawn(), self.held, self.copies(self.held), distributed.group.WORLD, rows=rows
        )

    @cached_property
    def whole(self) -> Experts:
        """All experts, which tell what is right; in memory only once they were asked for."""
        return self._drawn()

    def _drawn(self) -> Experts:
        return _whole_experts(self.plan.num_experts, self.trace.top_k, self.number, self._size)

    @staticmethod
    def turns_of(plan: Plan, number: int, trace: RoutingTrace, processes: int) -> list[NDArray[np.int64]]:
        """Per process the [E, G] turns of a layer's copies, without any process."""
        held, load_E = held_by(plan, number, processes), _load_E(plan, number, trace)
        return [turns_EG(plan, _copies_EG(held, plan.num_experts), load_E, source) for source in range(processes)]

    def copies(self, held: list[list[int | None]]) -> Copies:
        """The table of this process."""
        copies_EG = _copies_EG(held, self.plan.num_experts)
        return Copies.of(held, torch.from_numpy(turns_EG(self.plan, copies_EG, self._load_E, distributed.get_rank())))

    def right(self, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """What whole experts compute."""
        return self.whole(x_TD, expert_TK, weight_TK) if len(x_TD) else x_TD

    def inputs(self, x_TD: Tensor, rows: NDArray[np.int64]) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, ids and weights of some rows; an empty slot has the id E."""
        return x_TD[rows], *self.routed(rows)

    def routed(self, rows: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Ids and weights of some rows."""
        expert_TK = torch.from_numpy(self.trace.expert_TLK[rows, self.number].astype(np.int64))
        weight_TK = torch.full(expert_TK.shape, 1 / expert_TK.shape[1])
        if self.trace.weight_TLK is not None:
            weight_TK = torch.from_numpy(self.trace.weight_TLK[rows, self.number].astype(np.float32))
        return torch.where(expert_TK < 0, self.plan.num_experts, expert_TK), weight_TK


def _load_E(plan: Plan, number: int, trace: RoutingTrace) -> NDArray[np.float64]:
    """Tokens of every expert of a layer; of those that the trace never names, 0."""
    found_E = load_LE(trace)[number]
    return np.pad(found_E.astype(np.float64), (0, plan.num_experts - len(found_E)))


def _copies_EG(held: list[list[int | None]], num_experts: int) -> NDArray[np.int64]:
    """1 where a process holds an expert."""
    copies_EG = np.zeros((num_experts, len(held)), np.int64)
    for rank, experts in enumerate(held):
        copies_EG[[expert for expert in experts if expert is not None], rank] = 1
    return copies_EG


def _whole_experts(num_experts: int, top_k: int, number: int, size: Size) -> Experts:
    """All experts of a layer, the same on every process."""
    config = MoEConfig(
        num_experts=num_experts,
        num_experts_per_tok=min(top_k, num_experts),
        hidden_size=size.width,
        moe_intermediate_size=size.inner_width,
    )
    config._experts_implementation = "expertier"
    experts = Experts(config).requires_grad_(False)
    experts._is_expert_parallel = True
    generator = torch.Generator().manual_seed(size.seed * 1_000_003 + number)
    for parameter in experts.parameters():
        parameter.normal_(std=size.width**-0.5, generator=generator)
    return experts


def tokens(trace: RoutingTrace, size: Size) -> Tensor:
    """[T, D] a vector for every row, the same on every process."""
    return torch.randn(trace.num_tokens, size.width, generator=torch.Generator().manual_seed(size.seed))


@torch.no_grad()
def carry_out(plan: Plan, trace: RoutingTrace, size: Size, *, rows: str = "rank") -> dict[str, Any]:
    """All rows of a trace through all layers of a plan; all processes call this together.

    Returns:
        On every process: `moved`, one `Moved` per layer as counted; `bytes`, of all remote rows there and back;
        `error`, the largest relative difference from whole experts.
    """
    G, rank = distributed.get_world_size(), distributed.get_rank()
    x_TD = tokens(trace, size)
    calls = calls_of(source_T(trace, G), G, size.rows_per_call)[rank]
    counted, remote_bytes, error = [], 0, 0.0
    for number in range(plan.num_layers):
        layer = Layer(plan, number, trace, size, G, rows=rows)
        for own in calls:
            inputs = layer.inputs(x_TD, own)
            error = max(error, relative(layer.placed(*inputs), layer.whole(*inputs)))
        traffic = layer.placed.traffic
        counted.append(torch.stack([traffic.row_G, traffic.pair_G]))
        remote_bytes += traffic.remote_bytes
    row_GL2G = gathered(torch.stack(counted))
    totals = gathered(torch.tensor([float(remote_bytes), error], dtype=torch.float64))
    return {
        "moved": [Moved(row_GG=table[:, 0], pair_GG=table[:, 1]) for table in row_GL2G.transpose(0, 1).numpy()],
        "bytes": int(totals[:, 0].sum()),
        "error": float(totals[:, 1].max()),
    }


def relative(found: Tensor, right: Tensor) -> float:
    """The norm of a difference over that of what is right; 0 where there is nothing."""
    return float((found - right).norm() / right.norm()) if right.any() else float(found.norm())


def gathered(tensor: Tensor) -> Tensor:
    """[G, ...] the tensors of all processes."""
    found = [torch.empty_like(tensor) for _ in range(distributed.get_world_size())]
    distributed.all_gather(found, tensor)
    return torch.stack(found)
