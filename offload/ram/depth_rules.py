"""Rules that say, for each expert of each token, how many levels it is to be computed from.

Shapes: T tokens, K experts per token, E experts.
"""

from typing import Protocol

import torch

from ..cache.depth import DepthChoice
from .bit_router import BitGate


class DepthRule(Protocol):
    """A rule of one layer."""

    is_exact: bool
    """Whether levels beyond those that are asked for are left out, so that results do not depend on what is there."""
    num_deep: int | None
    """Experts, the hottest, whose further levels are read while nothing else is; None is all."""

    def depths(
        self, x_TD: torch.Tensor, expert_TK: torch.Tensor, weight_TK: torch.Tensor, is_there_E: torch.Tensor
    ) -> torch.Tensor:
        """Levels that each expert of each token needs, `[T, K]`; 0 leaves the expert out.

        Args:
            x_TD: what the experts are called with.
            expert_TK: their ids; those outside 0..E-1 are nobody's.
            weight_TK: what their outputs are multiplied with.
            is_there_E: whether at least the first level of an expert is in memory.
        """
        ...


class ByWeight:
    """An expert that misses is read whole if those with larger weights do not say enough, else in few bits or not.

    The sum of the larger weights of the same token, over the sum of all its weights, decides. What is there is used as
    it is, unless it is among those that are to be read whole.

    Source: HOBBIT (arXiv:2411.01433), section 3.2.

    Args:
        levels: of an expert in all.
        thresholds: of the sum, see `DepthChoice`.
    """

    is_exact = False
    num_deep = None

    def __init__(self, levels: int, thresholds: tuple[float, float]) -> None:
        self._levels, (self._whole, self._few) = levels, thresholds

    def depths(
        self, x_TD: torch.Tensor, expert_TK: torch.Tensor, weight_TK: torch.Tensor, is_there_E: torch.Tensor
    ) -> torch.Tensor:
        size_TK = weight_TK.float().abs()
        size_TK = size_TK / size_TK.sum(1, keepdim=True).clamp_min(1e-30)
        ordered_TK, place_TK = size_TK.sort(dim=1, descending=True, stable=True)
        before_TK = torch.empty_like(size_TK).scatter_(1, place_TK, ordered_TK.cumsum(1) - ordered_TK)
        # a sum that equals a threshold but for its rounding is within it
        whole_TK, few_TK = (before_TK <= threshold + 1e-6 for threshold in (self._whole, self._few))
        is_there_TK = is_there_E[expert_TK.clamp(0, len(is_there_E) - 1)]
        return torch.where(whole_TK, self._levels, (few_TK | is_there_TK).long())


class Hottest:
    """Every expert is computed from what is there of it, at least one level; the hottest are deepened meanwhile.

    Source: DynaExq (arXiv:2511.15015).

    Args:
        num_deep: experts of the layer that are held deep; None is as many as there is room for.
    """

    is_exact = False

    def __init__(self, num_deep: int | None) -> None:
        self.num_deep = num_deep

    def depths(
        self, x_TD: torch.Tensor, expert_TK: torch.Tensor, weight_TK: torch.Tensor, is_there_E: torch.Tensor
    ) -> torch.Tensor:
        return torch.ones_like(expert_TK)


def make_rule(choice: DepthChoice, levels: int, gate: BitGate | None = None) -> DepthRule:
    """The rule of a layer.

    Args:
        choice: what was asked for.
        levels: of its experts.
        gate: of the bit router, if that is asked for.
    """
    if gate is not None:
        return gate
    if choice.rule == "weight":
        return ByWeight(levels, choice.thresholds)
    return Hottest(choice.num_hot)
