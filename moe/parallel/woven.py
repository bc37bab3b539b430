"""Parts of the tokens woven: while the rows of one part travel, the experts of another part compute.

A layer is three steps, after each of which a part waits for others: how many rows will come, the rows, and what became
of its own. All processes take the steps of all parts in the same order. What is computed does not depend on it, so bits
are those of one part after the other.

There are two orders. `weave` has all parts at the same step; it is for one layer, or for fewer than four parts.
`stagger` has them at different steps, so that one computes in each slot of time while what the others wait for travels.
With four parts each of the three waits of a layer has a computation of its own to hide behind. With more, a step that
lasts longer than others holds up less.

Backward is woven by itself: autograd takes the last step first, and a gradient that begins to travel where rows landed
lands where they began to travel.

Source: the aims are TokenWeave's (Gond et al. 2025, arXiv:2505.11329) and Comet's (Zhang et al. 2025,
arXiv:2502.19811); their kernels, which share a GPU between both, are not here.

Shapes: T tokens of a part, K slots, D model width, N rows that this process sends, M rows that it receives.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor, autograd, distributed

from .dispatch import Compute, added, computed, note, sent_counts, slots_of, way_of
from .traffic import Traffic

Steps = Generator[None, None, Tensor]
"""Stops where something travels, three times per layer; returns its result."""
STEPS = 3
"""Of a layer: counts of rows begin to travel, rows, results."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Wire:
    """How rows travel while something else is computed.

    Args:
        rows: the processes; carries rows.
        counts: the same processes; carries how many rows come. It is another group, because a message waits for those
            that were sent before it on the same connection.
    """

    rows: distributed.ProcessGroup
    counts: distributed.ProcessGroup

    def begin_counts(self, sent_G2: Tensor) -> Callable[[], Tensor]:
        """Say how many rows will be sent; calling what is returned waits for what the others said."""
        received_G2 = torch.empty_like(sent_G2)
        work = distributed.all_to_all_single(received_G2, sent_G2, group=self.counts, async_op=True)

        def landed() -> Tensor:
            work.wait()
            _ = sent_G2  # read until then
            return received_G2

        return landed

    def begin(self, row_ND: Tensor, sent: Sequence[int], received: Sequence[int]) -> Callable[[], Tensor]:
        """Send rows, ordered by process; calling what is returned waits for those that come."""
        flight = _Flight(list(sent), list(received), self.rows)
        return partial(_Land.apply, _Depart.apply(row_ND, flight), flight)


class _Flight:
    """Rows on their way in forward, and their gradients on the way back.

    Args:
        sent, received: rows to and from each process, in forward.
        group: processes that exchange rows, this one included.
    """

    def __init__(self, sent: list[int], received: list[int], group: distributed.ProcessGroup) -> None:
        self.sent, self.received, self.group = sent, received, group

    def begin(self, row_ND: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """Where the rows of others will be."""
        self._read = row_ND = row_ND.contiguous()  # kept: it is read until the rows have landed
        self.row_MD = row_ND.new_empty(sum(received), *row_ND.shape[1:])
        self._work = distributed.all_to_all_single(self.row_MD, row_ND, received, sent, group=self.group, async_op=True)
        return self.row_MD

    def wait(self) -> Tensor:
        """The rows of others."""
        self._work.wait()
        row_MD = self.row_MD
        del self._read, self._work, self.row_MD
        return row_MD


class _Depart(autograd.Function):
    """Rows begin to travel; in backward their gradients have landed."""

    @staticmethod
    def forward(ctx: Any, row_ND: Tensor, flight: _Flight) -> Tensor:
        ctx.flight = flight
        return flight.begin(row_ND, flight.sent, flight.received)

    @staticmethod
    def backward(ctx: Any, _grad_MD: Tensor) -> tuple[Tensor, None]:
        return ctx.flight.wait(), None


class _Land(autograd.Function):
    """Rows have landed; in backward their gradients begin to travel."""

    @staticmethod
    def forward(ctx: Any, _row_MD: Tensor, flight: _Flight) -> Tensor:
        ctx.flight = flight
        return flight.wait()

    @staticmethod
    def backward(ctx: Any, grad_MD: Tensor) -> tuple[Tensor, None]:
        ctx.flight.begin(grad_MD, ctx.flight.received, ctx.flight.sent)
        return grad_MD, None


def in_steps(
    x_TD: Tensor,
    rank_TK: Tensor,
    local_TK: Tensor,
    weight_TK: Tensor,
    compute: Compute,
    wire: Wire,
    *,
    empty_id: int,
    traffic: Traffic | None = None,
) -> Steps:
    """`dispatch` of one part of the tokens, which stops where it would wait.

    Args:
        x_TD: this process's tokens of the part.
        rank_TK, local_TK, weight_TK, compute, empty_id, traffic: as for `dispatch`.
        wire: how rows travel.

    Returns:
        Steps; their result is [T, D], the weighted sums.
    """
    sent_G2 = sent_counts(rank_TK, wire.rows.size())
    counted = wire.begin_counts(sent_G2)
    yield
    way = way_of(rank_TK, sent_G2, counted())
    sent = (x_TD[way.token_N], *slots_of(way, rank_TK, local_TK, weight_TK, empty_id))
    flights = [wire.begin(rows, way.sent, way.received) for rows in sent]
    yield
    x_MD, id_MK, weight_MK = (landed() for landed in flights)
    if traffic is not None:
        note(traffic, way, x_TD, rank_TK, weight_TK, int((id_MK != empty_id).sum()))
    y_MD = computed(compute, x_MD, id_MK.long(), weight_MK, empty_id)
    back = wire.begin(y_MD, way.received, way.sent)
    yield
    return added(back(), way).to(x_TD.dtype)


def weave(parts: Sequence[Steps]) -> list[Tensor]:
    """The results of all parts, a step of each in turn; one part at a time is `weave` of each alone."""
    found: dict[int, Tensor] = {}
    while len(found) < len(parts):
        for number in range(len(parts)):
            _go_on(parts, number, found)
    return [found[number] for number in range(len(parts))]


def stagger(parts: Sequence[Steps]) -> list[Tensor]:
    """The results of all parts, each a slot of time behind the one before.

    In a slot one part computes, the one before it adds up what it computed a slot ago and says its next counts, and the
    one before that sends its rows.
    """
    found: dict[int, Tensor] = {}
    cycle = max(len(parts), STEPS)
    for slot in count():
        for lag in range(STEPS):
            number = (slot - lag) % cycle
            if number < min(slot, len(parts)):
                _go_on(parts, number, found)
        if len(found) == len(parts):
            break
    return [found[number] for number in range(len(parts))]


def _go_on(parts: Sequence[Steps], number: int, found: dict[int, Tensor]) -> None:
    """One more step of a part that is not done; its result, if that was the last one."""
    if number not in found:
        try:
            next(parts[number])
        except StopIteration as end:
            found[number] = end.value
