"""Autonomy of experts: no router; an expert is chosen by the norm of its own first, low-rank activation.

Shapes: T tokens, K experts per token, E experts, D model width, F expert width.
"""

from typing import Any

import torch
from torch import Tensor, nn

from routing import Carry, ClassicRouter, ClassicRule, RouterSizes, RoutingContext

from ...experts.bank import Experts
from ...layers.layer import MoELayer
from ...parts.config import MoEConfig
from ..body import Body


class LowRankGate(nn.Module):
    """The first halves of all experts' gate projections, read by every token: `[E, rank, D]`.

    Args:
        num_experts, rank, width: E, the rank, and D.
    """

    def __init__(self, num_experts: int, rank: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, rank, width))

    def init_parameters(self, std: float) -> None:
        """Activations of unit scale, so that norms differ by direction."""
        nn.init.normal_(self.weight, std=self.weight.shape[-1] ** -0.5)


class NormRouter(ClassicRouter):
    """Logits are the norms of the experts' low-rank activations; it has no weights of its own.

    Args:
        sizes, layer, rule: as of every classic router.
        gate: of the layer's experts, which own it.
    """

    def __init__(self, sizes: RouterSizes, layer: int, rule: ClassicRule, gate: LowRankGate) -> None:
        super().__init__(sizes, layer, rule)
        del self.weight
        self._gate = (gate,)  # in a tuple, or torch would register it again

    def init_parameters(self, std: float) -> None:
        """Nothing of its own to start."""

    def flops(self) -> float:
        """Every token meets every expert's low-rank projection."""
        return 2.0 * self._gate[0].weight.numel()

    def logits(self, x_TD: Tensor, carry: Carry, context: RoutingContext) -> tuple[Tensor, Carry]:
        low = torch.einsum("erd,td->ter", self._gate[0].weight.to(x_TD.dtype), x_TD)
        # a norm has no gradient at 0, where a token of zeros stands
        return low.square().sum(dim=-1).clamp_min(torch.finfo(low.dtype).tiny).sqrt(), carry


class AutonomousExperts(Experts):
    """Experts whose gate projection is `high[e] low[e]`; low is the gate that chooses.

    Args:
        config: gives E, D, F.
        gate: the low-rank parts.
    """

    def __init__(self, config: MoEConfig, gate: LowRankGate) -> None:
        super().__init__(config)
        E, rank, _ = gate.weight.shape
        F, D = config.moe_intermediate_size, config.hidden_size
        del self.gate_up_proj
        self.low = gate
        self.high = nn.Parameter(torch.empty(E, F, rank))
        self.up_proj = nn.Parameter(torch.empty(E, F, D))

    def init_parameters(self, std: float) -> None:
        """The product of both parts of a gate starts as a full gate would, with a standard deviation of `std`."""
        _, rank, D = self.low.weight.shape
        nn.init.normal_(self.high, std=std * (D / rank) ** 0.5)
        nn.init.normal_(self.up_proj, std=std)
        nn.init.normal_(self.down_proj, std=std)

    @property
    def gate_up_proj(self) -> Tensor:
        """[E, 2F, D], as every way to compute experts reads it."""
        return torch.cat([self.high @ self.low.weight, self.up_proj], dim=1)


class AutonomousLayer(MoELayer):
    """Experts that choose themselves; the rest is the ordinary layer."""

    def __init__(self, config: MoEConfig, layer: int, rank: int, rule: ClassicRule) -> None:
        gate = LowRankGate(config.num_experts, rank, config.hidden_size)
        router: Any = NormRouter(config.router_sizes, layer, rule, gate)
        super().__init__(config, router, AutonomousExperts(config, gate))


def autonomous(config: MoEConfig, *, rank: int | None = None) -> Body:
    """Experts of the K largest norms, weighted by a softmax of these norms; the config's router is not used.

    Args:
        config: sizes.
        rank: of the gates; a third of the width, as published, if None.

    Raises:
        ValueError: if the rank is out of range, or there are zero-compute experts, which have no activation.

    Source: Lv et al. 2025 (Autonomy-of-Experts), arXiv:2501.13074, section 3.
    """
    rank = max(1, config.hidden_size // 3) if rank is None else rank
    if not 1 <= rank <= config.hidden_size:
        raise ValueError(f"rank must lie in 1..{config.hidden_size} (D); got {rank}")
    if config.zero_compute_experts:
        raise ValueError("experts that choose themselves need an activation; leave zero_compute_experts out")
    rule = ClassicRule.of(score="selected_softmax")
    return Body(layers=[AutonomousLayer(config, layer, rank, rule) for layer in range(config.num_moe_layers)])
