"""Parts of the tokens woven through all layers of a plan: bits of one part after the other, and what that hides.

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

from moe.parallel import STEPS, Steps, Wire, in_steps, stagger, weave
from placement import Cluster, Plan, Problem, solve
from routing.traces import RoutingTrace

from ..train.distributed.launch import is_worker
from ..train.distributed.run import leave_group, process_group
from .coherent import follow
from .interface import Interface
from .work import Layer, Size, gathered, relative, source_T, tokens

PARTS = 6
"""Four have one that computes for each step of a layer that waits; two more make up for steps that last longer."""
TRIALS = 3
"""Runs of computation alone from which a rate follows, where a ratio was asked for."""


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
        size = _remote_bytes(row_ND, sent, self.rows)
        self._free_s[0] = due_s = max(time.monotonic(), self._free_s[0]) + size / self.bytes_per_s

        def landed_in_time() -> Tensor:
            found = landed()
            time.sleep(max(0.0, due_s - time.monotonic()))
            return found

        return landed_in_time


def _remote_bytes(row_ND: Tensor, sent: Sequence[int], group: distributed.ProcessGroup) -> int:
    """Bytes of these rows that leave this process."""
    rows = sum(sent) - sent[distributed.get_rank(group)]
    return rows * row_ND[:1].numel() * row_ND.element_size()


@dataclass(frozen=True, kw_only=True, eq=False)
class _Recorder(Wire):
    """Remembers what was sent and what came."""

    sent: list[tuple[Any, ...]] = field(default_factory=list)
    landed: list[Tensor] = field(default_factory=list)

    def begin_counts(self, sent_G2: Tensor) -> Callable[[], Tensor]:
        return self._kept(super().begin_counts(sent_G2))

    def begin(self, row_ND: Tensor, sent: Sequence[int], received: Sequence[int]) -> Callable[[], Tensor]:
        self.sent.append((row_ND, sent, received))
        return self._kept(super().begin(row_ND, sent, received))

    def _kept(self, landed: Callable[[], Tensor]) -> Callable[[], Tensor]:
        self.landed.append(landed())
        return partial(self.landed.__getitem__, len(self.landed) - 1)

    @property
    def remote_bytes(self) -> int:
        """Bytes of rows that left this process."""
        return sum(_remote_bytes(row_ND, sent, self.rows) for row_ND, sent, _ in self.sent)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Replay(Wire):
    """Nothing travels: what once came, in its order, is there at once.

    Args:
        landed: from a `_Recorder` of parts in turn.
    """

    landed: Iterator[Tensor]

    def begin_counts(self, sent_G2: Tensor) -> Callable[[], Tensor]:
        return partial(_same, next(self.landed))

    def begin(self, row_ND: Tensor, sent: Sequence[int], received: Sequence[int]) -> Callable[[], Tensor]:
        return partial(_same, next(self.landed))


def _same(tensor: Tensor) -> Tensor:
    return tensor


class TokenParts:
    """The tokens of this process in parts, and all layers of a plan; all processes have one.

    Args:
        plan: where the experts are.
        trace: what is routed.
        size: of experts and tokens.
        parts: how many.
    """

    def __init__(self, plan: Plan, trace: RoutingTrace, size: Size, parts: int = PARTS) -> None:
        G = distributed.get_world_size()
        number_N = np.flatnonzero(source_T(trace, G) == distributed.get_rank())
        self.numbers, self.x_TD = np.array_split(number_N, parts), tokens(trace, size)
        self.layers = [Layer(plan, number, trace, size, G) for number in range(plan.num_layers)]
        everyone = list(range(G))
        self.wire = Wire(rows=distributed.new_group(everyone), counts=distributed.new_group(everyone))

    def through(self, number_N: np.ndarray, wire: Wire) -> Steps:
        """One part through all layers."""
        x_ND = self.x_TD[number_N]
        for layer in self.layers:
            expert_NK, weight_NK = layer.routed(number_N)
            place, empty = layer.placed.copies.place(expert_NK), layer.placed.copies.slots
            y_ND = yield from in_steps(x_ND, *place, weight_NK, layer.placed.compute, wire, empty_id=empty)
            x_ND = follow(x_ND, y_ND)
        return x_ND

    def woven(self, wire: Wire) -> list[Tensor]:
        """All parts; each some steps behind the one before, where one computes beside each step that waits."""
        order = stagger if len(self.numbers) > STEPS else weave
        return order([self.through(number_N, wire) for number_N in self.numbers])

    def in_turn(self, wire: Wire) -> list[Tensor]:
        """One part after the other."""
        return [found for number_N in self.numbers for found in weave([self.through(number_N, wire)])]

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


@torch.no_grad()
def woven_parts(plan: Plan, trace: RoutingTrace, size: Size) -> dict[str, Any]:
    """`is_equal`: whether woven parts are bit-identical to one after the other, everywhere; `error`: the largest."""
    parts = TokenParts(plan, trace, size)
    woven, in_turn = parts.woven(parts.wire), parts.in_turn(parts.wire)
    is_equal = all(torch.equal(*pair) for pair in zip(woven, in_turn, strict=True))
    facts = gathered(torch.tensor([float(is_equal), parts.error(woven)]))
    return {"is_equal": bool(facts[:, 0].all()), "error": float(facts[:, 1].max())}


@dataclass(frozen=True, kw_only=True)
class Speed:
    """How fast rows leave each process.

    Args:
        bytes_per_s: at first.
        ratios: of exchange over computation, each alone, for which rates are found; without any, the first rate stays.
        interface: whose rate it is; None simulates one.
    """

    bytes_per_s: float
    ratios: Sequence[float] = ()
    interface: Interface | None = None

    def rates(self, compute: Callable[[], Any], row_bytes: int) -> list[float]:
        """Rates at which this computation and the exchange of rows have the ratios; all processes call this."""
        if not self.ratios:
            return [self.bytes_per_s]
        compute_s = float(np.median([_slowest_s(compute) for _ in range(TRIALS)]))
        most_bytes = float(gathered(torch.tensor([float(row_bytes)], dtype=torch.float64)).max())
        return [max(most_bytes / (ratio * compute_s), 1.0) for ratio in self.ratios]

    def wire(self, wire: Wire, bytes_per_s: float) -> Wire:
        """The connection at that rate."""
        if self.interface is None:
            return SlowWire(rows=wire.rows, counts=wire.counts, bytes_per_s=bytes_per_s)
        self.interface.limit(bytes_per_s)
        distributed.barrier()
        return wire


class _Ways:
    """What is timed: computation, exchange, parts in turn, parts woven; each means the same rows.

    Computation is all that a process does but for exchanging: routing tables, gathers, experts, sums.

    Args:
        cut: parts of the tokens.
    """

    def __init__(self, cut: TokenParts) -> None:
        self._cut, self._groups = cut, {"rows": cut.wire.rows, "counts": cut.wire.counts}
        self._recorder = _Recorder(**self._groups)
        self._right = cut.in_turn(self._recorder)

    @property
    def row_bytes(self) -> int:
        """Bytes of rows that leave this process."""
        return self._recorder.remote_bytes

    def compute(self) -> list[Tensor]:
        """All parts, with what was received before."""
        return self._cut.in_turn(_Replay(**self._groups, landed=iter(self._recorder.landed)))

    def exchange(self, wire: Wire) -> list[Tensor]:
        """All rows, begun at once: what the connection takes, without the latency of each exchange."""
        return [landed() for landed in [wire.begin(*given) for given in self._recorder.sent]]

    def expect_equal_bits(self, wire: Wire) -> None:
        """Refuse to time what is wrong anywhere; all processes call this."""
        found = self._cut.woven(wire)
        is_equal = all(torch.equal(*pair) for pair in zip(self._right, found, strict=True))
        if not gathered(torch.tensor([is_equal])).all():
            raise RuntimeError("woven parts have other bits than one part after the other; no time is shown")

    def seconds(self, wire: Wire, repeats: int) -> dict[str, float]:
        """Of each way; medians of runs that take turns, but for parts in turn, the longest, which run once."""
        self.expect_equal_bits(wire)
        in_turn_s = _slowest_s(partial(self._cut.in_turn, wire))
        ways: dict[str, Callable[[], Any]] = {
            "compute_s": self.compute,
            "exchange_s": partial(self.exchange, wire),
            "woven_s": partial(self._cut.woven, wire),
        }
        seconds = [{name: _slowest_s(run) for name, run in ways.items()} for _ in range(repeats)]
        medians = {name: float(np.median([found[name] for found in seconds])) for name in ways}
        return {"in_turn_s": in_turn_s} | medians


@torch.no_grad()
def time_overlap(
    plan: Plan, trace: RoutingTrace, size: Size, speed: Speed | None, repeats: int, parts: int = PARTS
) -> Iterator[dict[str, Any]]:
    """Seconds of computation and exchange alone, of parts in turn and woven; of the slowest process.

    Args:
        plan, trace, size, parts: as for `TokenParts`.
        speed: of the connection; None leaves it as it is.
        repeats: runs of each way but parts in turn.

    Yields:
        For each rate, once it is measured, `bytes_per_s`; `row_bytes` that leave this process once; `compute_s`,
        `exchange_s`, `in_turn_s`, `woven_s`; and if it has an interface `sent_over_rows`, bytes that left by it for
        each byte of rows.

    Raises:
        RuntimeError: if bits differ between the two orders.
    """
    cut = TokenParts(plan, trace, size, parts)
    ways = _Ways(cut)
    if speed is None:
        yield {"bytes_per_s": None, "row_bytes": ways.row_bytes} | ways.seconds(cut.wire, repeats)
        return
    for rate in speed.rates(ways.compute, ways.row_bytes):
        wire = speed.wire(cut.wire, rate)
        found = {"bytes_per_s": rate, "row_bytes": ways.row_bytes} | ways.seconds(wire, repeats)
        if speed.interface is not None:
            found["sent_over_rows"] = _sent_over_rows(speed.interface, ways, wire)
        yield found


def _sent_over_rows(interface: Interface, ways: _Ways, wire: Wire) -> float:
    """Bytes that this process sends for each byte of rows, headers and acknowledgements included."""
    before = interface.sent_bytes
    _slowest_s(partial(ways.exchange, wire))
    return (interface.sent_bytes - before) / max(ways.row_bytes, 1)


def _slowest_s(run: Callable[[], Any]) -> float:
    """Seconds of a run that all processes begin together, of the one that takes longest."""
    distributed.barrier()
    begun = time.perf_counter()
    run()
    return float(gathered(torch.tensor([time.perf_counter() - begun], dtype=torch.float64)).max())


def measure(
    *,
    tokens: int,
    layers: int,
    experts: int,
    top_k: int,
    width: int,
    inner_width: int,
    seed: int,
    parts: int,
    repeats: int,
    speed: Speed | None,
) -> Iterator[dict[str, Any]]:
    """`time_overlap` of random routing under the contiguous plan, on the processes that torchrun started, or on one.

    Args:
        tokens: of all processes.
        layers, experts, top_k: of the routing, in which every expert is as likely as any other.
        width, inner_width, seed: of the experts.
        parts, repeats, speed: as for `time_overlap`.
    """
    random = np.random.default_rng(seed)
    score_TLE = random.random((tokens, layers, experts))
    trace = RoutingTrace(
        expert_TLK=np.argpartition(score_TLE, -top_k, axis=2)[..., -top_k:].astype(np.int16),
        sequence_T=np.arange(tokens, dtype=np.int32),
        metadata={"num_experts": experts},
    )
    with process_group() if is_worker() else _alone(), _one_thread():
        problem = Problem.from_trace(trace, Cluster.grid(1, distributed.get_world_size()))
        plan = solve(problem, solver="contiguous", processes=1)
        size = Size(width=width, inner_width=inner_width, seed=seed)
        yield from time_overlap(plan, trace, size, speed, repeats, parts)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one thread, as each of several processes on one machine does."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _alone() -> Iterator[None]:
    """A group of this process."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        leave_group()
