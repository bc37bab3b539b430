"""Training in JAX: one compiled optimiser step whose buffers are donated, and its exact state on disk.

Shapes: A micro-batches per optimiser step, B batch, S positions, L MoE layers, E FFN experts, R routable experts.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from jax.sharding import Mesh

from ...parts.config import MoEConfig
from ..model.checkpoint import read_tensors, save_pretrained, set_tensors
from ..model.decoder import MoEForCausalLM
from ..parts.mesh import place_batch
from .distribute import distribute, on_mesh
from .leaves import restore_leaves, save_leaves
from .optimisation import Optimisation, directions

STATE_FILE = "training_state.safetensors"
# side of the square matrices whose product is timed, and how often: long enough for a clock, short beside a run
PROBE_SIZE, PROBE_REPEATS = 768, 5


class State(NamedTuple):
    """What a step changes: parameters, optimiser moments, and variables that no gradient moves (balancing biases)."""

    params: nnx.State
    moments: optax.OptState
    variables: nnx.State


class StepResult(NamedTuple):
    """What a step tells; losses are means over its micro-batches, `kept_LE` their sum.

    Args:
        loss, lm_loss: in nats, with and without auxiliary losses.
        gradient_norm: global norm of the gradient before clipping.
        entropy: mean router entropy of the last micro-batch in nats.
        kept_LE: tokens that each FFN expert computed.
    """

    loss: Array
    lm_loss: Array
    gradient_norm: Array
    entropy: Array
    kept_LE: Array


class Trainer:
    """A model in training.

    Args:
        config: sizes, router and losses of the model.
        how: settings of the optimiser, clipping and precision.
        mesh: devices to spread over, or None for the default device.
        product: how experts are computed; see `MoEForCausalLM`.

    Raises:
        ValueError: if the model has no JAX twin or does not fit the mesh.
    """

    def __init__(
        self, config: MoEConfig, how: Optimisation, *, mesh: Mesh | None = None, product: str | None = None
    ) -> None:
        self.how, self.mesh = how, mesh
        self._optimizer = directions(how)
        self._hold(MoEForCausalLM(config, nnx.Rngs(how.seed), product=product))

    @property
    def model(self) -> MoEForCausalLM:
        """The model as it is now; a copy of nothing, so it is void after the next step."""
        return nnx.merge(self._graph, self._state.params, self._state.variables)

    def step(self, token_ABS: np.ndarray, rate: float, number: int) -> StepResult:
        """One optimiser step.

        Args:
            token_ABS: integers, one [B, S] batch per micro-batch.
            rate: learning rate of this step.
            number: steps done before; together with the seed it fixes the noise.
        """
        tokens = place_batch(token_ABS.astype(np.int32), self.mesh)
        self._state, result = self._step(self._state, tokens, jnp.float32(rate), jnp.int32(number))
        return jax.device_get(result)

    def evaluate(self, token_BS: np.ndarray) -> float:
        """Mean cross entropy per predicted token in nats, without anything that belongs to training.

        Args:
            token_BS: integers; -100 is not scored, so that a last batch can be filled up and needs no compilation.
        """
        token_BS = jnp.asarray(token_BS.astype(np.int32))
        return float(self._evaluate(self._state.params, self._state.variables, token_BS))

    def save(self, folder: Path) -> None:
        """Write the model as a Hugging Face folder, and the optimiser's state beside it.

        Of several processes all call this together, and the first one writes.
        """
        save_pretrained(self.model, folder)
        save_leaves(self._state.moments, folder / STATE_FILE)

    def start_from(self, folder: Path) -> None:
        """Take over the weights of a Hugging Face folder, with fresh moments.

        Raises:
            ValueError: if they do not fit this model.
        """
        model = self.model
        set_tensors(model, read_tensors(folder), source=str(folder))
        self._hold(model)

    def restore(self, folder: Path) -> None:
        """Take over what `save` wrote, bit for bit.

        Raises:
            ValueError: if there is no state, or it does not fit this model.
        """
        path = folder / STATE_FILE
        if not path.is_file():
            raise ValueError(f"{folder} has no {STATE_FILE}: it was not trained by JAX; resume it with its own backend")
        self.start_from(folder)
        self._state = self._state._replace(moments=restore_leaves(self._state.moments, path))

    def _hold(self, model: MoEForCausalLM) -> None:
        """Make a model the one that is trained, with fresh moments."""
        if self.mesh is not None:
            distribute(model, self.mesh)
        self._graph, params, variables = nnx.split(model, nnx.Param, ...)
        self._state = State(params, on_mesh(self._optimizer.init(params), self.mesh), variables)
        self._step = jax.jit(self._build_step(), donate_argnums=0)
        self._evaluate = jax.jit(self._forward_loss)

    def _build_step(self) -> Callable[[State, Array, Array, Array], tuple[State, StepResult]]:
        def micro_step(params: nnx.State, variables: nnx.State, token_BS: Array, key: Array) -> tuple[Array, Any]:
            model = nnx.merge(self._graph, _in_precision(params, self.how.precision), variables)
            output = model(token_BS, token_BS, is_training=True, key=key)
            stats = output.router_stats
            count_LR = jnp.stack([layer.chosen.count_R for layer in stats])
            kept_LE = jnp.stack([layer.kept.count_R[: layer.kept.E] for layer in stats])
            entropy = jnp.stack([layer.entropy for layer in stats]).mean()
            return output.loss, (output.lm_loss, count_LR, kept_LE, entropy)

        def step(state: State, token_ABS: Array, rate: Array, number: Array) -> tuple[State, StepResult]:
            def micro(gradient: nnx.State, numbered: tuple[Array, Array]) -> tuple[nnx.State, Any]:
                place, token_BS = numbered
                key = jax.random.fold_in(jax.random.key(self.how.seed), number * len(token_ABS) + place)
                differentiate = jax.value_and_grad(micro_step, has_aux=True)
                (loss, facts), one = differentiate(state.params, state.variables, token_BS, key)
                return jax.tree.map(jnp.add, gradient, one), (loss, *facts)

            zeros = jax.tree.map(jnp.zeros_like, state.params)
            gradient, facts = jax.lax.scan(micro, zeros, (jnp.arange(len(token_ABS)), token_ABS))
            loss_A, lm_loss_A, count_ALR, kept_ALE, entropy_A = facts
            gradient = jax.tree.map(lambda leaf: leaf / len(token_ABS), gradient)
            norm = optax.tree.norm(gradient)
            updates, moments = self._optimizer.update(gradient, state.moments, state.params)
            params = jax.tree.map(lambda p, update: p - rate * update, state.params, updates)
            model = nnx.merge(self._graph, params, state.variables)
            model.post_step(count_ALR.sum(axis=0))
            _, params, variables = nnx.split(model, nnx.Param, ...)
            result = StepResult(loss_A.mean(), lm_loss_A.mean(), norm, entropy_A[-1], kept_ALE.sum(axis=0))
            return State(params, moments, variables), result

        return step

    def _forward_loss(self, params: nnx.State, variables: nnx.State, token_BS: Array) -> Array:
        model = nnx.merge(self._graph, _in_precision(params, self.how.precision), variables)
        return model(jnp.maximum(token_BS, 0), token_BS).lm_loss


def resolve_precision(precision: str) -> str:
    """`auto` becomes `bfloat16` where it multiplies at least 1.2 times as fast as `float32`; other names stay."""
    if precision != "auto":
        return precision
    return "bfloat16" if _probe_s(jnp.float32) > 1.2 * _probe_s(jnp.bfloat16) else "float32"


def _probe_s(dtype: jnp.dtype) -> float:
    left = jnp.ones((PROBE_SIZE, PROBE_SIZE), dtype)
    multiply = jax.jit(jnp.matmul)
    samples = []
    for _ in range(PROBE_REPEATS + 1):
        start = time.perf_counter()
        multiply(left, left).block_until_ready()
        samples.append(time.perf_counter() - start)
    return min(samples[1:])


def _in_precision(params: nnx.State, precision: str) -> nnx.State:
    """Parameters as a forward pass takes them: in bfloat16 those of matrix products, but not those of routers."""
    if precision == "float32":
        return params

    def cast(path: tuple[Any, ...], leaf: Array) -> Array:
        names = jax.tree_util.keystr(path)
        is_product = any(name in names for name in ("kernel", "gate_up_proj", "down_proj")) and "router" not in names
        return leaf.astype(jnp.bfloat16) if is_product else leaf

    return jax.tree_util.tree_map_with_path(cast, params)
