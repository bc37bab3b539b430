"""Experts where a placement plan says, replicas included, for serving: any experts module of transformers or ours.

Shapes: T tokens, K slots, E experts, D model width, G processes.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn

from ..inference.logit_offsets import experts_modules
from .copies import Copies
from .dispatch import dispatch
from .traffic import Traffic

Held = Sequence[Sequence[int | None]]


class PlacedExperts:
    """One layer's experts, of which this process has some; takes the place of an experts module's forward.

    Args:
        experts: a whole experts module; it keeps the weights of this process's experts only.
        held: per process its experts in the order of their places; None for a free place.
        copies: of this process.
        group: the processes that the plan's GPUs stand for; `held` has an entry for each.
        rows: `rank` sends a token once to each process that holds some of its experts, `pair` once per expert.
    """

    def __init__(
        self,
        experts: nn.Module,
        held: Held,
        copies: Copies,
        group: distributed.ProcessGroup,
        *,
        rows: str = "rank",
    ) -> None:
        self.experts, self.group, self.rows = experts, group, rows
        self.copies = copies
        self.num_experts = experts.num_experts
        self.traffic = Traffic(num_ranks=group.size(), rank=group.rank())
        self.compute = experts.forward
        """Of the experts that this process has, by their places."""
        self._keep(held[group.rank()])
        experts.forward = self
        experts.placed = self

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        rank_TK, local_TK = self.copies.place(top_k_index)
        if self.rows == "rank":
            return self._dispatched(hidden_states, rank_TK, local_TK, top_k_weights)
        (T, D), K = hidden_states.shape, top_k_index.shape[1]
        x_ND = hidden_states[:, None].expand(T, K, D).flatten(0, 1)
        y_ND = self._dispatched(x_ND, rank_TK.view(-1, 1), local_TK.view(-1, 1), top_k_weights.reshape(-1, 1))
        return y_ND.view(T, K, D).sum(dim=1)

    def _dispatched(self, x_TD: Tensor, rank_TK: Tensor, local_TK: Tensor, weight_TK: Tensor) -> Tensor:
        return dispatch(
            x_TD,
            rank_TK,
            local_TK,
            weight_TK,
            self.compute,
            self.group,
            empty_id=self.copies.slots,
            traffic=self.traffic,
        )

    @torch.no_grad()
    def _keep(self, own: Sequence[int | None]) -> None:
        """Keep the weights of this process's experts; a free place holds zeros."""
        E = self.num_experts
        index = torch.tensor([E if expert is None else expert for expert in own], dtype=torch.int64)
        for name, parameter in list(self.experts.named_parameters(recurse=False)):
            if parameter.shape[0] != E:
                continue
            rows = parameter.data[index.clamp(max=E - 1)]
            rows[index == E] = 0
            self.experts.register_parameter(name, nn.Parameter(rows, requires_grad=False))
        self.experts.num_experts = len(own)
        # tells transformers' own implementations that ids may reach the number of experts
        self.experts._is_expert_parallel = True

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert's weights."""
        return sum(row.nbytes for row in self.rows_of(0)) if self.experts.num_experts else 0

    def rows_of(self, place: int) -> list[Tensor]:
        """The weights in a place of this process, as views."""
        return [
            parameter.data[place]
            for _, parameter in sorted(self.experts.named_parameters(recurse=False))
            if parameter.shape[0] == self.experts.num_experts
        ]


def place_experts(
    model: nn.Module,
    held: Sequence[Held],
    copies: Sequence[Copies],
    group: distributed.ProcessGroup,
    **settings: Any,
) -> list[PlacedExperts]:
    """Carry out a plan on a whole model, in place; all processes call this together.

    Args:
        model: of transformers or ours.
        held, copies: per MoE layer, first to last.
        group: the processes that the plan's GPUs stand for; `held` has an entry for each.
        settings: of `PlacedExperts`.

    Raises:
        ValueError: if the model has another number of layers with experts, or of experts.
    """
    banks = list(experts_modules(model).values())
    if len(banks) != len(held):
        raise ValueError(f"the plan is of {len(held)} layers with experts, the model has {len(banks)}")
    for layer, (bank, table) in enumerate(zip(banks, copies, strict=True)):
        if bank.num_experts != len(table.turns_E):
            raise ValueError(
                f"the plan is of {len(table.turns_E)} experts, layer {layer} of the model has {bank.num_experts}"
            )
    layers = zip(banks, held, copies, strict=True)
    return [PlacedExperts(bank, held_by, table, group, **settings) for bank, held_by, table in layers]
