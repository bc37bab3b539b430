"""Experts without a gate whose hidden units are rectified: most of them are exactly zero.

Shapes: T tokens, K slots, E experts, D model width, F expert width.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.activations import ACT2FN
from transformers.integrations.moe import use_experts_implementation

from ..parts.config import MoEConfig


@use_experts_implementation(has_gate=False)
class ReluExperts(nn.Module):
    """`y = down relu(up x)` for E experts; `forward` here is the eager loop, used when the config asks for `eager`.

    Args:
        config: gives E, D and F.

    Source: Yang et al. 2025 (MoE-X), arXiv:2503.07639, section 4.1.
    """

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        E, D, F = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.num_experts = E
        self.up_proj = nn.Parameter(torch.empty(E, F, D))
        self.down_proj = nn.Parameter(torch.empty(E, D, F))
        self.act_fn = ACT2FN["relu"]

    def flops(self, load_E: Tensor) -> float:
        """Operations per token of the text, of which `load_E` visit each expert; zeros are multiplied like the rest."""
        return float(load_E.sum()) * 4.0 * self.up_proj[0].numel()

    def forward(self, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """[T, D]: the weighted sum over each token's experts; ids >= E contribute nothing."""
        y_TD = torch.zeros_like(x_TD)
        for expert in expert_TK.unique().tolist():
            if expert >= self.num_experts:
                continue
            token_id, slot = torch.where(expert_TK == expert)
            y = linear(self.act_fn(linear(x_TD[token_id], self.up_proj[expert])), self.down_proj[expert])
            y_TD.index_add_(0, token_id, (y * weight_TK[token_id, slot, None]).to(y_TD.dtype))
        return y_TD
