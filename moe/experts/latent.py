"""Latent experts: the experts of a group read two small projections of the token instead of the token itself.

Shapes: T tokens, K slots, N rows sorted by expert, G groups of experts that share a basis, R rank, E experts, D
model width, F expert width.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad
from transformers.activations import ACT2FN
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, use_experts_implementation

from ..parts.config import MoEConfig
from .looped_product import looped_product
from .sorted_rows import combine, groups_of, product_dtype, spans


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
        dtype = product_dtype(self.gate_basis)
        expert_N, order_N = expert_TK.flatten().sort(stable=True)
        ends = groups_of(expert_N, self.num_experts).end_E.tolist()
        latents = self._latents(x_TD.to(dtype), expert_N[: ends[-1]], order_N[: ends[-1]] // expert_TK.shape[1])
        # offloaded weights are no tensors: they come one expert at a time, and pass no gradient
        is_differentiable = torch.is_grad_enabled() and isinstance(self.gate_up_proj, Tensor)
        y_ND = (self._together if is_differentiable else self._in_turn)(*latents, ends)
        if num_empty := len(order_N) - ends[-1]:
            y_ND = pad(y_ND, (0, 0, 0, num_empty))
            weight_TK = torch.where(expert_TK < self.num_experts, weight_TK, 0.0)
        return combine(y_ND, order_N, weight_TK, x_TD.dtype)

    def _latents(self, x_TD: Tensor, expert_N: Tensor, token_N: Tensor) -> tuple[Tensor, Tensor]:
        """What the gate and the up projection of each row read, [N, rank] each; a token is projected once per group."""
        T, num_groups = len(x_TD), len(self.gate_basis)
        group_N = expert_N // self.group
        visits_GT = torch.zeros(num_groups, T, dtype=torch.bool, device=x_TD.device)
        visits_GT[group_N, token_N] = True
        place_GT = visits_GT.flatten().cumsum(0).view(num_groups, T)
        place_N, ends = place_GT[group_N, token_N] - 1, visits_GT.sum(dim=1).cumsum(0).tolist()
        visitors = x_TD.index_select(0, visits_GT.nonzero()[:, 1])
        gate, up = (
            looped_product(visitors, basis.to(x_TD.dtype).transpose(1, 2), ends)
            for basis in (self.gate_basis, self.up_basis)
        )
        return gate.index_select(0, place_N), up.index_select(0, place_N)

    def _together(self, gate_NR: Tensor, up_NR: Tensor, ends: list[int]) -> Tensor:
        """[N, D]: all rows through one projection after the other."""
        dtype = gate_NR.dtype
        gate_EFR, up_EFR = self.gate_up_proj.to(dtype).unflatten(1, (2, -1)).unbind(1)
        hidden_NF = self.act_fn(looped_product(gate_NR, gate_EFR.transpose(1, 2), ends))
        hidden_NF = hidden_NF * looped_product(up_NR, up_EFR.transpose(1, 2), ends)
        return looped_product(hidden_NF, self.down_proj.to(dtype).transpose(1, 2), ends)

    def _in_turn(self, gate_NR: Tensor, up_NR: Tensor, ends: list[int]) -> Tensor:
        """[N, D]: one expert after the other, so that one expert's weights are needed at a time."""
        y_ND = gate_NR.new_empty(len(gate_NR), self.gate_basis.shape[2])
        for expert, rows in spans(ends):
            gate_FR, up_FR = self.gate_up_proj[expert].to(gate_NR.dtype).chunk(2)
            hidden_nF = self.act_fn(linear(gate_NR[rows], gate_FR)).mul_(linear(up_NR[rows], up_FR))
            torch.mm(hidden_nF, self.down_proj[expert].to(gate_NR.dtype).T, out=y_ND[rows])
        return y_ND
