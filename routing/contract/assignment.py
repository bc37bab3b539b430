"""Routing: the frozen result of one router call, which experts each token visits and with what weight.

Shapes: T tokens, K slots per token, E FFN experts, Z zero-compute experts, R = E + Z routable experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Routing:
    """Where T tokens go at one MoE layer.

    Args:
        expert_TK: int64 ids. `0..E-1` are FFN experts, `E..E+Z-1` the layer's zero-compute experts, `E+Z` an empty slot
            (dropped or padding). Routers with a varying number of experts per token pad with empty slots.
        weight_TK: float32 combine weights, with gradient; 0 in empty slots.
        num_experts: E, which is also the first id that is no FFN expert.
        num_zero_compute: Z; 0 without zero-compute experts.

    Raises:
        ValueError: if shapes or dtypes are not as above. Values are checked by `validate`, which costs a device sync.
    """

    expert_TK: Tensor
    weight_TK: Tensor
    num_experts: int
    num_zero_compute: int = 0

    def __post_init__(self) -> None:
        if self.expert_TK.ndim != 2 or self.expert_TK.dtype != torch.int64:
            raise ValueError(
                f"expert_TK must be int64 [T, K]; got {self.expert_TK.dtype} {tuple(self.expert_TK.shape)}"
            )
        if self.weight_TK.shape != self.expert_TK.shape or not self.weight_TK.is_floating_point():
            raise ValueError(
                f"weight_TK must be floating point {tuple(self.expert_TK.shape)}; "
                f"got {self.weight_TK.dtype} {tuple(self.weight_TK.shape)}"
            )

    @property
    def num_routable(self) -> int:
        """R: FFN experts and zero-compute experts."""
        return self.num_experts + self.num_zero_compute

    @property
    def empty_id(self) -> int:
        """The id of an empty slot."""
        return self.num_routable

    @property
    def count_R(self) -> Tensor:
        """int64 slots per routable expert, empty slots left out."""
        return torch.bincount(self.expert_TK.flatten(), minlength=self.num_routable + 1)[: self.num_routable]

    def ffn_view(self) -> tuple[Tensor, Tensor]:
        """What an experts module takes: ids with E for every slot that no FFN expert computes, and weights 0 there."""
        is_ffn_TK = self.expert_TK < self.num_experts
        return self.expert_TK.clamp(max=self.num_experts), torch.where(is_ffn_TK, self.weight_TK, 0.0)

    def validate(self) -> Self:
        """Check ids and the weights of empty slots.

        Raises:
            ValueError: if an id lies outside 0..E+Z or an empty slot has a weight.
        """
        low, high = self.expert_TK.aminmax()
        if low < 0 or high > self.empty_id:
            raise ValueError(f"expert ids must lie in 0..{self.empty_id}; got {int(low)}..{int(high)}")
        if (self.weight_TK[self.expert_TK == self.empty_id] != 0).any():
            raise ValueError("empty slots must have weight 0")
        return self

    @classmethod
    def from_dense(cls, weight_TR: Tensor, is_chosen_TR: Tensor, *, num_experts: int) -> Self:
        """From a weight per token and routable expert: choices heaviest first, padded to the longest row."""
        R = weight_TR.shape[1]
        K = max(1, int(is_chosen_TR.sum(dim=-1).max())) if len(is_chosen_TR) else 1
        rank_TR = weight_TR.detach().masked_fill(~is_chosen_TR, -torch.inf)
        expert_TK = rank_TR.topk(K, dim=-1).indices
        is_empty_TK = ~is_chosen_TR.gather(-1, expert_TK)
        chosen = cls(
            expert_TK=expert_TK,
            weight_TK=weight_TR.gather(-1, expert_TK),
            num_experts=num_experts,
            num_zero_compute=R - num_experts,
        )
        return chosen.drop(is_empty_TK)

    @classmethod
    def beside(cls, parts: Sequence[Self]) -> Self:
        """Several routings of the same tokens as one, whose slots are the slots of all of them."""
        return replace(
            parts[0],
            expert_TK=torch.cat([part.expert_TK for part in parts], dim=1),
            weight_TK=torch.cat([part.weight_TK for part in parts], dim=1),
        )

    def split(self, repeats: int) -> list[Self]:
        """The routings of `repeats` equal groups of rows."""
        rows = zip(self.expert_TK.chunk(repeats), self.weight_TK.chunk(repeats), strict=True)
        return [replace(self, expert_TK=expert_TK, weight_TK=weight_TK) for expert_TK, weight_TK in rows]

    def drop(self, is_dropped_TK: Tensor) -> Self:
        """The same routing with some slots emptied."""
        return replace(
            self,
            expert_TK=self.expert_TK.masked_fill(is_dropped_TK, self.empty_id),
            weight_TK=self.weight_TK.masked_fill(is_dropped_TK, 0.0),
        )
