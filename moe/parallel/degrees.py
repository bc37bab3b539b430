"""Degrees: whether tokens travel to experts or experts to tokens, chosen for every step, while no parameter moves.

Every process has the same E / G experts of a bank for good. Under the expert degree d, d neighbours are a row: they
send tokens to each other. The G / d processes at the same place of all rows lend each other their experts before a
call, so that each has all of them for it, and once more in backward; gradients are summed where the experts came from.
So d = G sends tokens only, d = 1 lends experts only, and a change of degree is a change of groups. At most one layer's
experts are lent at a time.

Source: Hwang et al. 2023 (Tutel), arXiv:2206.03382, section 3: adaptive parallelism and adaptive pipelining, on one
layout of parameters and gradients.

Shapes: T tokens, K slots, D model width, E experts, G processes.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, autograd, distributed, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.device_mesh import DeviceMesh
from transformers.distributed.expert_parallel import EPImplementationInterface

from .dispatch import RankDispatch, computed, dispatch
from .traffic import Traffic
from .woven import Wire, in_steps, weave


@dataclass(frozen=True, kw_only=True)
class Degree:
    """How the experts of a step are reached.

    Args:
        expert: d, processes of a row, which send each other tokens; divides all processes.
        parts: into which each process cuts its tokens; parts are woven.
    """

    expert: int
    parts: int = 1


def degrees(processes: int) -> tuple[Degree, ...]:
    """All that so many processes can choose from, most tokens sent first; halves only where tokens are sent."""
    divisors = [d for d in range(processes, 0, -1) if processes % d == 0]
    return tuple(Degree(expert=d, parts=parts) for d in divisors for parts in ((1, 2) if d > 1 else (1,)))


@dataclass(frozen=True, kw_only=True, eq=False)
class Row:
    """The groups of this process under one expert degree.

    Args:
        wire: to the processes of its row.
        lenders: the processes at its place of all rows.
    """

    wire: Wire
    lenders: distributed.ProcessGroup

    @classmethod
    def of(cls, expert: int, processes: int) -> "Row":
        """The groups of an expert degree; all processes call this together."""
        across = [list(range(first, first + expert)) for first in range(0, processes, expert)]
        down = [list(range(place, processes, expert)) for place in range(expert)]
        rows, counts, lenders = (distributed.new_subgroups_by_enumeration(ranks)[0] for ranks in (across, across, down))
        return cls(wire=Wire(rows=rows, counts=counts), lenders=lenders)


class DegreeDispatch(RankDispatch):
    """A bank that is split over all processes, under the degree that `take` was last told."""

    def __init__(self, experts: nn.Module, ep_mesh: DeviceMesh, tp_mesh: DeviceMesh) -> None:
        super().__init__(experts, ep_mesh, tp_mesh)
        self._bank = experts
        experts.dispatch = self

    def take(self, degree: Degree, row: Row) -> None:
        """Use a degree from the next call on; every process takes the same one."""
        group = row.wire.rows
        self._degree, self._row = degree, row
        self.traffic = self._bank.traffic = Traffic(num_ranks=group.size(), rank=group.rank())

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        S, G, d = self.num_local_experts, self.ep_mesh.size(), self._degree.expert
        owner_TK, is_empty_TK, empty_id = top_k_index // S, top_k_index >= S * G, S * (G // d)
        # a place of a row has the experts of every d-th process
        rank_TK = torch.where(is_empty_TK, d, owner_TK % d)
        local_TK = torch.where(is_empty_TK, empty_id, owner_TK // d * S + top_k_index % S)
        given = (hidden_states, rank_TK, local_TK, top_k_weights)
        with _borrowed(self._bank, self._row.lenders):
            if d == 1:
                return computed(self.experts_forward, hidden_states, local_TK, top_k_weights, empty_id)
            if self._degree.parts == 1:
                group = self._row.wire.rows
                return dispatch(*given, self.experts_forward, group, empty_id=empty_id, traffic=self.traffic)
            # not `chunk`, which gives fewer parts where there are few tokens: the others would wait
            parts = zip(*(tensor.tensor_split(self._degree.parts) for tensor in given), strict=True)
            steps = [
                in_steps(*part, self.experts_forward, self._row.wire, empty_id=empty_id, traffic=self.traffic)
                for part in parts
            ]
            return torch.cat(weave(steps))


DEGREES = "expertier_degrees"
"""Under this name transformers' expert parallelism finds the dispatch above; `split` gives it its groups."""
EPImplementationInterface.register(DEGREES, DegreeDispatch)


@contextmanager
def _borrowed(bank: nn.Module, lenders: distributed.ProcessGroup) -> Iterator[None]:
    """While this is open the bank has the experts of all lenders, in their order."""
    if lenders.size() == 1:
        yield
        return
    own, num_experts = dict(bank._parameters), bank.num_experts
    loan = _Loan(list(own.values()), lenders)
    bank._parameters.update(zip(own, _Borrow.apply(loan, *own.values()), strict=True))
    bank.num_experts = num_experts * lenders.size()
    try:
        with saved_tensors_hooks(loan.packed, loan.unpacked):
            yield
    finally:
        loan.returned()
        bank._parameters.update(own)
        bank.num_experts = num_experts


class _Loan:
    """The experts of a group of processes, there while they are used: in forward, and once more in backward.

    Args:
        own: this process's parameters; the first axis is that of experts.
        lenders: processes that have other experts of the same layer, this one included; two or more.
    """

    def __init__(self, own: Sequence[Tensor], lenders: distributed.ProcessGroup) -> None:
        self._own, self._lenders, self._whole = [tensor.detach() for tensor in own], lenders, list[Tensor]()

    def whole(self) -> list[Tensor]:
        """Every parameter with the experts of all; the first call is a collective."""
        if not self._whole:
            self._whole = [self._gathered(tensor) for tensor in self._own]
        return self._whole

    def returned(self) -> None:
        """Nothing needs them for now."""
        self._whole = []

    def reduced(self, grads: Sequence[Tensor]) -> list[Tensor]:
        """This process's part of the sums of all processes' gradients."""
        # autograd of a process without a row may not have asked for weights, and the others would wait
        self.whole()
        self.returned()
        return [self._part_of_sum(grad) for grad in grads]

    def packed(self, tensor: Tensor) -> Any:
        """What autograd keeps of a tensor: of lent experts only how they lie in the whole."""
        for place, whole in enumerate(self._whole):
            if tensor.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr():
                return place, tensor.size(), tensor.stride(), tensor.storage_offset()
        return tensor

    def unpacked(self, kept: Any) -> Tensor:
        """The tensor that `packed` was given."""
        if isinstance(kept, Tensor):
            return kept
        place, *how = kept
        return self.whole()[place].as_strided(*how)

    def _gathered(self, own: Tensor) -> Tensor:
        whole = own.new_empty(self._lenders.size() * len(own), *own.shape[1:])
        distributed.all_gather(list(whole.chunk(self._lenders.size())), own.contiguous(), group=self._lenders)
        return whole

    def _part_of_sum(self, grad: Tensor) -> Tensor:
        pieces = list(grad.contiguous().chunk(self._lenders.size()))
        own = torch.empty_like(pieces[0])
        distributed.reduce_scatter(own, pieces, group=self._lenders)
        return own


class _Borrow(autograd.Function):
    """A process's parameters become those of all; gradients go back to the lenders."""

    @staticmethod
    def forward(ctx: Any, loan: _Loan, *own: Tensor) -> tuple[Tensor, ...]:
        ctx.loan = loan
        return tuple(whole.view_as(whole) for whole in loan.whole())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return None, *ctx.loan.reduced(grads)
