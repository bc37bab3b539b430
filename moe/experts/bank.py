"""Experts: the weights of one layer's SwiGLU experts, computed by whichever implementation the config names.

Shapes: T tokens, K slots, E experts, D model width, F expert width.
"""

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.integrations.moe import use_experts_implementation

from ..parts.config import MoEConfig
from ..parts.flops import feed_forward_flops


@use_experts_implementation
class Experts(nn.Module):
    """E gated feed-forward networks; `forward` here is the eager loop, used when the config asks for `eager`.

    Args:
        config: gives E, D, F and the activation.
        width: F, if not that of the config.
    """

    def __init__(self, config: MoEConfig, width: int | None = None) -> None:
        super().__init__()
        E, D, F = config.num_experts, config.hidden_size, width or config.moe_intermediate_size
        self.num_experts = E
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * F, D))
        self.down_proj = nn.Parameter(torch.empty(E, D, F))
        self.act_fn = ACT2FN[config.hidden_act]

    def flops(self, load_E: Tensor) -> float:
        """Operations per token of the text, of which `load_E` visit each expert."""
        _, D, F = self.down_proj.shape
        return float(load_E.sum()) * feed_forward_flops(D, F)

    def forward(self, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """[T, D]: the weighted sum over each token's experts; ids >= E contribute nothing."""
        y_TD = torch.zeros_like(x_TD)
        for expert in expert_TK.unique().tolist():
            if expert >= self.num_experts:
                continue
            token_id, slot = torch.where(expert_TK == expert)
            gate_up = nn.functional.linear(x_TD[token_id], self.gate_up_proj[expert])
            y = nn.functional.linear(self._apply_gate(gate_up), self.down_proj[expert])
            y_TD.index_add_(0, token_id, (y * weight_TK[token_id, slot, None]).to(y_TD.dtype))
        return y_TD
