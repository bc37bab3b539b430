"""Carry out a migration between two plans while forwards go on: transfers in rounds, places freed and filled.

All processes know all steps. A layer's map changes on every process between the same two forwards, so no forward sees
half of a change; a copy is freed only after another one has its turns, which the order of the steps guarantees.

Source: the aims are ElasticMoE's, arXiv:2510.02613; disjoint pairs per round as in vLLM's migration scheduler.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, distributed, nn

from .copies import Copies
from .placed import PlacedExperts

MakeCopies = Callable[[list[list[int | None]]], Copies]


@dataclass(frozen=True, kw_only=True)
class Move:
    """One expert's weights from a process that holds them to one that has none; `source` None frees a copy.

    Args:
        expert: its id.
        source: the process that sends, or None.
        target: the process that receives, or whose copy is freed.
    """

    expert: int
    source: int | None
    target: int


class MovingLayer:
    """One layer whose experts move; every process has one, in the same state.

    Args:
        placed: this process's part of the layer.
        held: per process its experts by place, as `placed` was made from.
        make_copies: the table of this process for what is then held.
    """

    def __init__(self, placed: PlacedExperts, held: Sequence[Sequence[int | None]], make_copies: MakeCopies) -> None:
        self.placed, self._make_copies = placed, make_copies
        self.held = [list(experts) for experts in held]
        self.moved_bytes = 0
        self.most_held = [sum(expert is not None for expert in experts) for experts in self.held]

    def rounds(self, moves: Sequence[Move]) -> Iterator[int]:
        """Carry out the moves in order; yields after each round how many experts moved, with the new map in force.

        A round is a run of moves whose transfers are between disjoint pairs of processes.
        """
        waiting = list(moves)
        while waiting:
            batch, busy = [], set[int]()
            while waiting and not busy & _busy(waiting[0]):
                busy |= _busy(waiting[0])
                batch.append(waiting.pop(0))
            self._transfer([move for move in batch if move.source is not None])
            for move in batch:
                if move.source is None:
                    self.held[move.target][self.held[move.target].index(move.expert)] = None
            self.placed.copies = self._make_copies(self.held)
            yield sum(move.source is not None for move in batch)

    @torch.no_grad()
    def _transfer(self, moves: Sequence[Move]) -> None:
        rank = self.placed.group.rank()
        pending: list[distributed.P2POp] = []
        for move in moves:
            place = self._free_place(move.target)
            if rank == move.source:
                rows = self.placed.rows_of(self.held[rank].index(move.expert))
                pending += [distributed.P2POp(distributed.isend, row.contiguous(), move.target) for row in rows]
                self.moved_bytes += self.placed.expert_bytes
            elif rank == move.target:
                rows = self.placed.rows_of(place)
                pending += [distributed.P2POp(distributed.irecv, row, move.source) for row in rows]
            self.held[move.target][place] = move.expert
            live = sum(expert is not None for expert in self.held[move.target])
            self.most_held[move.target] = max(self.most_held[move.target], live)
        if pending:
            for work in distributed.batch_isend_irecv(pending):
                work.wait()

    def _free_place(self, rank: int) -> int:
        """A place of a process without an expert; it grows by one if there is none."""
        held = self.held[rank]
        if None not in held:
            held.append(None)
            if rank == self.placed.group.rank():
                _grow(self.placed.experts)
        return held.index(None)


def _busy(move: Move) -> set[int]:
    """The processes that a transfer occupies; freeing a copy occupies the one that does it."""
    return {move.target} if move.source is None else {move.source, move.target}


def _grow(experts: nn.Module) -> None:
    """Room for one more expert at the end of every table of weights."""
    for name, parameter in list(experts.named_parameters(recurse=False)):
        if parameter.shape[0] == experts.num_experts:
            more: Tensor = torch.cat([parameter.data, parameter.data.new_zeros(1, *parameter.shape[1:])])
            experts.register_parameter(name, nn.Parameter(more, requires_grad=False))
    experts.num_experts += 1
