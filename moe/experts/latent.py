"""Latent experts: the experts of a group read two small projections of the token instead of the token itself.

Shapes: T tokens, K slots, E experts, D model width, F expert width.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.activations import ACT2FN
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, use_experts_implementation

from ..parts.config import MoEConfig


class OwnLoop:
    """An experts interface that offers nothing but offloading: every other name means the module's own loop."""

    def get_interface(self, name: str | None, own: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return ALL_EXPERTS_FUNCTIONS.get_interface(name, own) if name == "expertier_offload" else own


@use_experts_implementation(experts_interface=OwnLoop())
class LatentExperts(nn.Module):
    """E gated networks whose inputs are `gate_basis[j] x` and `up_basis[j] x`, with j = expert // group.

    `y = down (act(gate (gate_basis x)) * (up (up_basis x)))`; the down projection is full. A token is projected once
    per group that it visits. The bases stay resident under offloading; what belongs to one expert moves.

    Args:
        config: gives E, D, F and the activation.
        group: experts that share a basis; the last group may be smaller.
        rank: latent width, at most D.

    Raises:
        ValueError: if group or rank is out of range.

    Source: Liu et al. 2025 (MoLAE), arXiv:2503.23100, section 3.
    """

    is_own_loop = True
    """Nothing but this module's own loop computes it, offloaded or not."""

    def __init__(self, config: MoEConfig, group: int, rank: int) -> None:
        super().__init__()
        E, D, F = config.num_experts, config.hidden_size, config.moe_intermediate_size
        if not 1 <= group <= E:
            raise ValueError(f"group must lie in 1..{E}, the number of experts; got {group}")
        if not 1 <= rank <= D:
            raise ValueError(f"rank must lie in 1..{D}, the model's width; got {rank}")
        self.num_experts, self.group = E, group
        num_groups = -(-E // group)
        self.gate_basis = nn.Parameter(torch.empty(num_groups, rank, D))
        self.up_basis = nn.Parameter(torch.empty(num_groups, rank, D))
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * F, rank))
        self.down_proj = nn.Parameter(torch.empty(E, D, F))
        self.act_fn = ACT2FN[config.hidden_act]

    def init_parameters(self, std: float) -> None:
        """Latents of unit scale, and products of the size that full matrices would have."""
        _, rank, D = self.gate_basis.shape
        for basis in (self.gate_basis, self.up_basis):
            nn.init.normal_(basis, std=D**-0.5)
        nn.init.normal_(self.gate_up_proj, std=std * (D / rank) ** 0.5)
        nn.init.normal_(self.down_proj, std=std)

    def flops(self, load_E: Tensor) -> float:
        """Operations per token of the text, of which `load_E` visit each expert.

        A token is projected at most once per group, and at most as often as it visits the group's experts.
        """
        own = 2.0 * (self.gate_up_proj[0].numel() + self.down_proj[0].numel())
        groups = sum(min(1.0, float(load.sum())) for load in load_E.split(self.group))
        return float(load_E.sum()) * own + groups * 4.0 * self.gate_basis[0].numel()

    def forward(self, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """[T, D]: the weighted sum over each token's experts; ids >= E contribute nothing."""
        y_TD = torch.zeros_like(x_TD)
        used = [expert for expert in expert_TK.unique().tolist() if expert < self.num_experts]
        for group in sorted({expert // self.group for expert in used}):
            is_here_T = ((expert_TK // self.group == group) & (expert_TK < self.num_experts)).any(dim=-1)
            token_of_row = is_here_T.nonzero()[:, 0]
            row_of_token = is_here_T.cumsum(0) - 1
            latents = [linear(x_TD[token_of_row], basis[group]) for basis in (self.gate_basis, self.up_basis)]
            for expert in (expert for expert in used if expert // self.group == group):
                token_id, slot = torch.where(expert_TK == expert)
                y = self._expert(expert, *(latent[row_of_token[token_id]] for latent in latents))
                y_TD.index_add_(0, token_id, (y * weight_TK[token_id, slot, None]).to(y_TD.dtype))
        return y_TD

    def _expert(self, expert: Any, gate_latent: Tensor, up_latent: Tensor) -> Tensor:
        gate, up = self.gate_up_proj[expert].chunk(2)
        return linear(self.act_fn(linear(gate_latent, gate)) * linear(up_latent, up), self.down_proj[expert])
