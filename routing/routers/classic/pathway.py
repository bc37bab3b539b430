"""MoE++'s pathway-aware router: each layer's logits add a linear map of the previous layer's.

Source: Jin et al. 2024 (MoE++), arXiv:2410.07348, eq. 6. The two-layer gate and the normalised logits are in the
released code only (SkyworkAI/MoE-plus-plus, `moe_plus_plus_layer.py`), which has the first on by default and the second
off; the paper has neither.

Shapes: T tokens, D model width, R routable experts.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ...contract.context import Carry, RoutingContext
from ...contract.router import RouterSizes
from ..options import Options
from .classic import ClassicRouter, Scores
from .rule import RULE_PARTS, ClassicRule

LOGIT = "previous_logit"
HIDDEN_PER_EXPERT = 8  # as in the released code
# Added to variances: a token whose logits are all equal (padding) has variance 0, where the root has no gradient.
LEAST_VARIANCE = 1e-12


@dataclass(frozen=True, kw_only=True)
class PathwayOptions(Options):
    """Options of MoE++ besides those of the rule.

    Args:
        gating_residual: whether logits add a map of the previous layer's; without, the rule alone is left.
        gate_layers: 1, or 2 for a gate D -> 8 R -> tanh -> R without biases.
        logit_std: a token's logits are scaled to this standard deviation before they are scored; None leaves them.
            What is carried is not scaled.

    Raises:
        ValueError: if a value is out of range, or the gate has options but no residual.
    """

    gating_residual: bool = True
    gate_layers: int = 1
    logit_std: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gate_layers not in (1, 2):
            raise ValueError(f"gate_layers must be 1 or 2; got {self.gate_layers}")
        if not self.gating_residual and (self.gate_layers, self.logit_std) != (1, None):
            raise ValueError("gate_layers and logit_std are options of the gate with a residual; set gating_residual")


class PathwayRouter(ClassicRouter):
    """A classic router with a gating residual; raw logits are carried, with gradient.

    Args:
        sizes: D, E, Z, K, L.
        layer: which MoE layer this router serves; layer 0 has no predecessor.
        rule: how logits become a routing.
        options: form of the gate and scale of its logits.

    Raises:
        ValueError: if `logit_std` is not positive or there is one expert only.
    """

    option_groups: ClassVar[tuple[type, ...]] = (*RULE_PARTS, PathwayOptions)

    def __init__(self, sizes: RouterSizes, layer: int, rule: ClassicRule, options: PathwayOptions) -> None:
        logit_std = options.logit_std
        if logit_std is not None and (logit_std <= 0 or sizes.num_routable == 1):
            raise ValueError(f"logit_std must be positive, and needs 2 experts or more; got {logit_std}")
        R = sizes.num_routable
        hidden_width = HIDDEN_PER_EXPERT * R if options.gate_layers == 2 else None
        super().__init__(sizes, layer, rule, score_width=hidden_width)
        self.logit_std = logit_std
        self.hidden_weight = nn.Parameter(torch.empty(hidden_width, sizes.width)) if hidden_width else None
        self.residual_weight = nn.Parameter(torch.empty(R, R)) if layer else None

    @classmethod
    def of_rule(cls, sizes: RouterSizes, rule: ClassicRule, *own: Any) -> list[nn.Module]:
        """Without the residual, routers of the rule alone."""
        (options,) = own
        return super().of_rule(sizes, rule, *own) if options.gating_residual else ClassicRouter.of_rule(sizes, rule)

    def logits(self, x_TD: Tensor, carry: Carry, context: RoutingContext) -> tuple[Tensor, Carry]:
        if self.hidden_weight is not None:
            x_TD = linear(x_TD, self.hidden_weight.to(x_TD.dtype)).tanh()
        logit_TR, carry = super().logits(x_TD, carry, context)
        before_TR = carry.get(LOGIT)
        if self.residual_weight is not None and before_TR is not None:
            logit_TR = logit_TR + linear(before_TR, self.residual_weight.to(logit_TR.dtype))
        return logit_TR, carry.put(**{LOGIT: logit_TR})

    def score(self, logit_TR: Tensor) -> Scores:
        if self.logit_std is not None:
            variance_T1 = logit_TR.var(dim=-1, keepdim=True) + LEAST_VARIANCE
            logit_TR = logit_TR * (self.logit_std * variance_T1.rsqrt())
        return super().score(logit_TR)
