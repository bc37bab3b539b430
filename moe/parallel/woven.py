"""Parts of the tokens woven: while the rows of one part travel, the experts of another part compute.

A layer is a few steps between which a part waits for its rows. `weave` goes round the parts, a step of each in turn, so
that a part's rows are on their way while the others have their steps. All processes go round in the same order. What is
computed does not depend on the order, so bits are those of one part after the other.

Source: the aims are TokenWeave's (Gond et al. 2025, arXiv:2505.11329) and Comet's (Zhang et al. 2025,
arXiv:2502.19811); their kernels, which share a GPU between both, are not here.

Shapes: T tokens of a part, K slots, D model width, N rows that this process sends, M rows that it receives.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, distributed

from .dispatch import Compute, added, slots_of, ways

Steps = Generator[None, None, Tensor]
"""Stops where rows travel; returns its result."""


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

    def begin(self, row_ND: Tensor, sent: Sequence[int], received: Sequence[int]) -> Callable[[], Tensor]:
        """Send rows, ordered by process; calling what is returned waits for those that come."""
        row_ND = row_ND.contiguous()
        row_MD = row_ND.new_empty(sum(received), *row_ND.shape[1:])
        work = distributed.all_to_all_single(row_MD, row_ND, list(received), list(sent), group=self.rows, async_op=True)

        def landed() -> Tensor:
            work.wait()
            # until then the sender reads it
            _ = row_ND
            return row_MD

        return landed


def in_steps(
    x_TD: Tensor,
    rank_TK: Tensor,
    local_TK: Tensor,
    weight_TK: Tensor,
    compute: Compute,
    wire: Wire,
    *,
    empty_id: int,
) -> Steps:
    """`dispatch` of one part of the tokens, which stops where it would wait; without gradient.

    Args:
        x_TD: this process's tokens of the part.
        rank_TK, local_TK, weight_TK, compute, empty_id: as for `dispatch`.
        wire: how rows travel.

    Returns:
        Steps; their result is [T, D], the weighted sums.
    """
    way = ways(rank_TK, wire.counts)
    sent = (x_TD[way.token_N], *slots_of(way, rank_TK, local_TK, weight_TK, empty_id))
    flights = [wire.begin(rows, way.sent, way.received) for rows in sent]
    yield
    x_MD, id_MK, weight_MK = (landed() for landed in flights)
    y_MD = compute(x_MD, id_MK.long(), weight_MK) if len(x_MD) else x_MD
    back = wire.begin(y_MD, way.received, way.sent)
    yield
    return added(back(), way).to(x_TD.dtype)


@torch.no_grad()
def weave(parts: Sequence[Steps]) -> list[Tensor]:
    """The results of all parts, a step of each in turn; one part at a time is `weave` of each alone."""
    found: dict[int, Tensor] = {}
    while len(found) < len(parts):
        for number, steps in enumerate(parts):
            if number not in found:
                try:
                    next(steps)
                except StopIteration as end:
                    found[number] = end.value
    return [found[number] for number in range(len(parts))]
