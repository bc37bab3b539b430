"""RMoE's router and its cell; twins of `routing.routers.classic.recurrent` and of torch's `GRUCell`.

Shapes: T tokens, D model width, R routable experts, p = width of the recurrent state.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from routing import ClassicRule, RouterSizes

from ..parts.dense import normal
from .assignment import Carry
from .classic import ClassicRouter, initial


class GRUCell(nnx.Module):
    """A gated recurrent unit with the parameters and gate order of torch's `GRUCell`.

    Args:
        width: p, of input and state.
        rule: of its router, whose `init` says how the weights start.
        std: of normal initial weights; biases start at 0.
        rngs: random streams.
    """

    def __init__(self, width: int, rule: ClassicRule, std: float, rngs: nnx.Rngs) -> None:
        self.weight_ih = _inner(rule, rngs, (3 * width, width), std)
        self.weight_hh = _inner(rule, rngs, (3 * width, width), std)
        self.bias_ih = nnx.Param(jnp.zeros(3 * width, jnp.float32))
        self.bias_hh = nnx.Param(jnp.zeros(3 * width, jnp.float32))

    def __call__(self, x_Tp: Array, state_Tp: Array) -> Array:
        weight_ih, weight_hh, bias_ih, bias_hh = (
            parameter[...].astype(jnp.float32)
            for parameter in (self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)
        )
        reset_x, update_x, new_x = jnp.split(x_Tp @ weight_ih.T + bias_ih, 3, axis=-1)
        reset_h, update_h, new_h = jnp.split(state_Tp @ weight_hh.T + bias_hh, 3, axis=-1)
        update = jax.nn.sigmoid(update_x + update_h)
        new = jnp.tanh(new_x + jax.nn.sigmoid(reset_x + reset_h) * new_h)
        return (1 - update) * new + update * state_Tp


class RecurrentRouter(ClassicRouter):
    """RMoE: scores from the state of a GRU that runs through the layers. See `routing.routers.classic.recurrent`.

    Args:
        sizes, layer, rule, std, rngs: as for `ClassicRouter`.
        cell: shared by all layers; checkpoints hold it once, at layer 0.
        width: p.
        recurrence: `full`, `detach` or `none`.
    """

    def __init__(
        self,
        sizes: RouterSizes,
        layer: int,
        rule: ClassicRule,
        std: float,
        rngs: nnx.Rngs,
        *,
        cell: GRUCell,
        width: int,
        recurrence: str,
    ) -> None:
        super().__init__(sizes, layer, rule, std, rngs, score_width=width)
        self.projection = _inner(rule, rngs, (width, sizes.width), std)
        self.cell, self.recurrence = cell, recurrence

    def logits(self, x_TD: Array, carry: Carry) -> tuple[Array, Carry]:
        projected_Tp = x_TD @ self.projection[...].astype(jnp.float32).T
        before_Tp = carry.get("recurrent_state")
        if before_Tp is None or self.recurrence == "none":
            before_Tp = jnp.zeros_like(projected_Tp)
        elif self.recurrence == "detach":
            before_Tp = lax.stop_gradient(before_Tp)
        state_Tp = self.cell(projected_Tp, before_Tp)
        return state_Tp @ self.weight[...].astype(jnp.float32).T, carry | {"recurrent_state": state_Tp}


def _inner(rule: ClassicRule, rngs: nnx.Rngs, shape: tuple[int, int], std: float) -> nnx.Param:
    """A matrix of RMoE before its scores: normal, unless all of them start as torch's own layers do."""
    return initial(rule, rngs, shape, std) if rule.initial.init == "kaiming" else normal(rngs, shape, std)
