"""Zero-compute experts: ids that cost no matrix product.

`zero` adds nothing, `copy` adds the (normed) input itself, `constant` adds `a1 * x + a2 * v` with a learnt vector v and
[a1, a2] = softmax(W_c x). Source: Jin et al. 2024 (MoE++), arXiv:2410.07348, eqs. 3-5.

Shapes: T tokens, K slots, D model width, Z zero-compute experts.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from routing import Routing


class ZeroComputeExperts(nn.Module):
    """The Z zero-compute experts of one layer, in the order of their ids.

    Args:
        kinds: `zero`, `copy` or `constant` for each of them.
        width: D, the width of tokens in and out.
    """

    def __init__(self, kinds: Sequence[str], width: int) -> None:
        super().__init__()
        self.kinds = tuple(kinds)
        num_constant = self.kinds.count("constant")
        self.constant = nn.Parameter(torch.empty(num_constant, width)) if num_constant else None
        self.mix = nn.Parameter(torch.empty(num_constant, 2, width)) if num_constant else None

    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """[T, D]: the weighted sum of what the chosen zero-compute experts return."""
        y_TD = torch.zeros_like(x_TD)
        num_constants_seen = 0
        for place, kind in enumerate(self.kinds):
            weight_T1 = self._weight(routing, place)
            if kind == "copy":
                y_TD = y_TD + weight_T1 * x_TD
            elif kind == "constant":
                y_TD = y_TD + weight_T1 * self._constant(x_TD, num_constants_seen)
                num_constants_seen += 1
        return y_TD.to(x_TD.dtype)

    def _constant(self, x_TD: Tensor, index: int) -> Tensor:
        share_T2 = (x_TD @ self.mix[index].T.to(x_TD.dtype)).softmax(dim=-1)
        return share_T2[:, :1] * x_TD + share_T2[:, 1:] * self.constant[index].to(x_TD.dtype)

    @staticmethod
    def _weight(routing: Routing, place: int) -> Tensor:
        is_it_TK = routing.expert_TK == routing.num_experts + place
        return torch.where(is_it_TK, routing.weight_TK, 0.0).sum(dim=-1, keepdim=True)
