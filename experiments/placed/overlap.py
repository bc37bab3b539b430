"""Halves of the tokens woven through all layers of a plan: bits of one half after the other, and what that hides.

Shapes: N rows of tokens on this process, G processes.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed

from moe.parallel import Steps, Wire, in_steps, weave
from placement import Cluster, Plan, Problem, solve
from routing.traces import RoutingTrace

from ..train.distributed.launch import is_worker
from ..train.distributed.run import leave_group, process_group
from .coherent import follow
from .work import Layer, Size, gathered, relative, source_T, tokens

HALVES = 2
"""More parts hide no more where one exchange is as long as one computation, and have more messages."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SlowWire(Wire):
    """A wire with a rate, SIMULATED: rows come no earlier than the bytes that leave this process would take.

    Args:
        bytes_per_s: of this process to all others together.
    """

    bytes_per_s: float
    _free_s: list[float] = field(default_factory=lambda: [0.0])

    def begin(self, row_ND: Tensor, sent: Sequence[int], received: Sequence[int]) -> Callable[[], Tensor]:
        landed = super().begin(row_ND, sent, received)
        rows = sum(sent) - sent[distributed.get_rank(self.rows)]
        size = rows * row_ND[:1].numel() * row_ND.element_size()
        self._free_s[0] = due_s = max(time.monotonic(), self._free_s[0]) + size / self.bytes_per_s

        def landed_in_time() -> Tensor:
            found = landed()
            time.sleep(max(0.0, due_s - time.monotonic()))
            return found

        return landed_in_time


@dataclass(frozen=True, kw_only=True, eq=False)
class _Recorder(Wire):
    """Remembers what was sent."""

    sent: list[tuple[Any, ...]] = field(default_factory=list)

    def begin(self, row_ND: Tensor, sent: Sequence[int], received: Sequence[int]) -> Callable[[], Tensor]:
        self.sent.append((row_ND, sent, received))
        return super().begin(row_ND, sent, received)


class Halves:
    """The tokens of this process in halves, and all layers of a plan; all processes have one.

    Args:
        plan: where the experts are.
        trace: what is routed.
        size: of experts and tokens.
    """

    def __init__(self, plan: Plan, trace: RoutingTrace, size: Size) -> None:
        G = distributed.get_world_size()
        number_N = np.flatnonzero(source_T(trace, G) == distributed.get_rank())
        self.numbers, self.x_TD = np.array_split(number_N, HALVES), tokens(trace, size)
        self.layers = [Layer(plan, number, trace, size, G) for number in range(plan.num_layers)]
        everyone = list(range(G))
        self.wire = Wire(rows=distributed.new_group(everyone), counts=distributed.new_group(everyone))
        self.calls: list[Callable[[], Tensor]] = []

    def through(self, number_N: np.ndarray, wire: Wire, *, is_recorded: bool = False) -> Steps:
        """One half through all layers."""
        x_ND = self.x_TD[number_N]
        for layer in self.layers:
            expert_NK, weight_NK = layer.routed(number_N)
            compute = partial(self._recorded, layer.placed.compute) if is_recorded else layer.placed.compute
            place, empty = layer.placed.copies.place(expert_NK), layer.placed.copies.slots
            y_ND = yield from in_steps(x_ND, *place, weight_NK, compute, wire, empty_id=empty)
            x_ND = follow(x_ND, y_ND)
        return x_ND

    def _recorded(self, compute: Callable[..., Tensor], *given: Tensor) -> Tensor:
        self.calls.append(partial(compute, *given))
        return compute(*given)

    def woven(self, wire: Wire) -> list[Tensor]:
        """Both halves, a step of each in turn."""
        return weave([self.through(number_N, wire) for number_N in self.numbers])

    def in_turn(self, wire: Wire, *, is_recorded: bool = False) -> list[Tensor]:
        """One half after the other."""
        return [
            found
            for number_N in self.numbers
            for found in weave([self.through(number_N, wire, is_recorded=is_recorded)])
        ]

    @torch.no_grad()
    def error(self, found: Sequence[Tensor]) -> float:
        """The largest relative difference from whole experts."""
        errors = [0.0]
        for number_N, x_ND in zip(self.numbers, found, strict=True):
            right_ND = self.x_TD[number_N]
            for layer in self.layers if len(number_N) else ():
                right_ND = follow(right_ND, layer.whole(right_ND, *layer.routed(number_N)))
            errors.append(relative(x_ND, right_ND))
        return max(errors)


def woven_halves(plan: Plan, trace: RoutingTrace, size: Size) -> dict[str, Any]:
    """`is_equal`: whether woven halves are bit-identical to one after the other, everywhere; `error`: the largest."""
    halves = Halves(plan, trace, size)
    woven, in_turn = halves.woven(halves.wire), halves.in_turn(halves.wire)
    is_equal = all(torch.equal(*pair) for pair in zip(woven, in_turn, strict=True))
    facts = gathered(torch.tensor([float(is_equal), halves.error(woven)]))
    return {"is_equal": bool(facts[:, 0].all()), "error": float(facts[:, 1].max())}


@torch.no_grad()
def time_overlap(
    plan: Plan, trace: RoutingTrace, size: Size, simulated_bytes_per_s: float | None, repeats: int
) -> dict[str, Any]:
    """Seconds of computation and exchange alone, of halves in turn and woven; medians, of the slowest process.

    Args:
        plan, trace, size: as for `Halves`.
        simulated_bytes_per_s: rate of `SlowWire`; None leaves rows to the connection as it is.
        repeats: runs of each, which take turns.

    Raises:
        RuntimeError: if bits differ between the two orders.
    """
    halves = Halves(plan, trace, size)
    groups = {"rows": halves.wire.rows, "counts": halves.wire.counts}
    wire = halves.wire if simulated_bytes_per_s is None else SlowWire(bytes_per_s=simulated_bytes_per_s, **groups)
    recorder = _Recorder(**groups)
    right, found = halves.in_turn(recorder, is_recorded=True), halves.woven(wire)
    is_equal = gathered(torch.tensor([all(torch.equal(*pair) for pair in zip(right, found, strict=True))]))
    if not is_equal.all():
        raise RuntimeError("woven halves have other bits than one half after the other; no time is shown")
    ways: dict[str, Callable[[], Any]] = {
        "compute": lambda: [call() for call in halves.calls],
        # all rows begun at once: what the connection takes, without the latency of each exchange
        "exchange": lambda: [landed() for landed in [wire.begin(*given) for given in recorder.sent]],
        "in_turn": lambda: halves.in_turn(wire),
        "woven": lambda: halves.woven(wire),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, run in ways.items():
            distributed.barrier()
            begun = time.perf_counter()
            run()
            seconds[name].append(float(gathered(torch.tensor([time.perf_counter() - begun])).max()))
    return {f"{name}_s": float(np.median(values)) for name, values in seconds.items()}


def measure(
    *,
    tokens: int,
    layers: int,
    experts: int,
    top_k: int,
    width: int,
    inner_width: int,
    seed: int,
    repeats: int,
    simulated_bytes_per_s: float | None,
) -> dict[str, Any]:
    """`time_overlap` of random routing under the contiguous plan, on the processes that torchrun started, or on one.

    Args:
        tokens: of all processes.
        layers, experts, top_k: of the routing, in which every expert is as likely as any other.
        width, inner_width, seed: of the experts.
        simulated_bytes_per_s, repeats: as for `time_overlap`.
    """
    random = np.random.default_rng(seed)
    score_TLE = random.random((tokens, layers, experts))
    trace = RoutingTrace(
        expert_TLK=np.argpartition(score_TLE, -top_k, axis=2)[..., -top_k:].astype(np.int16),
        sequence_T=np.arange(tokens, dtype=np.int32),
        metadata={"num_experts": experts},
    )
    with process_group() if is_worker() else _alone():
        torch.set_num_threads(1)
        problem = Problem.from_trace(trace, Cluster.grid(1, distributed.get_world_size()))
        plan = solve(problem, solver="contiguous", processes=1)
        size = Size(width=width, inner_width=inner_width, seed=seed)
        return time_overlap(plan, trace, size, simulated_bytes_per_s, repeats)


@contextmanager
def _alone() -> Iterator[None]:
    """A group of this process."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        leave_group()
