"""MoE++'s router; twin of `routing.routers.classic.pathway`.

Shapes: T tokens, D model width, R routable experts.
"""

import jax.numpy as jnp
from flax import nnx
from jax import Array

from routing import ClassicRule, RouterSizes

from ..parts.dense import normal
from .assignment import Carry
from .classic import ClassicRouter


class PathwayRouter(ClassicRouter):
    """MoE++: a classic router whose logits add a linear map of the previous layer's."""

    def __init__(self, sizes: RouterSizes, layer: int, rule: ClassicRule, std: float, rngs: nnx.Rngs) -> None:
        super().__init__(sizes, layer, rule, std, rngs)
        self.residual_weight = normal(rngs, (sizes.num_routable,) * 2, std) if layer else None

    def logits(self, x_TD: Array, carry: Carry) -> tuple[Array, Carry]:
        logit_TR, carry = super().logits(x_TD, carry)
        if self.residual_weight is not None and "previous_logit" in carry:
            logit_TR = logit_TR + carry["previous_logit"] @ self.residual_weight[...].astype(jnp.float32).T
        return logit_TR, carry | {"previous_logit": logit_TR}
