"""A model of one's own on many devices, from three functions: for a batch of examples, its loss, and its answers.

Nothing in the three functions knows of devices. Parameters are split by a rule that looks at names and shapes, batches
by their first axis, and XLA inserts the communication; loss and gradients are those of one device, but for rounding.

Source: Tan et al. 2023 (Redco), arXiv:2310.16355, section 3.

Shapes: B examples of a batch.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh

from ..parts.mesh import partition_by_shape, place_examples
from ..parts.processes import whole_array
from .distribute import Rule, distributed_tree, on_mesh
from .leaves import restore_leaves, save_leaves


class PipelineState(NamedTuple):
    """What a step changes: parameters, the optimiser's moments, and the number of steps done."""

    params: Any
    moments: optax.OptState
    done: Array


class Pipeline:
    """Training and inference of any model whose parameters are a tree of arrays: nnx state, linen parameters, a dict.

    Of several processes (`jax.distributed`) all build the same one and call the same methods with the same examples.

    Args:
        params: the model's; they are moved to the mesh, so use `Pipeline.params` from then on.
        collate: a list of examples to a tree of arrays [B, ...], in numpy.
        loss: (params, batch, key) to the mean loss of the batch; `key` is new for every step, and None where nothing is
            trained, so that noise is left out.
        predict: (params, batch) to a tree of arrays [B, ...].
        optimizer: of optax, learning rate included.
        mesh: of `build_mesh`; None uses the default device.
        rule: how a parameter is split: (names of its path, shape, mesh) to a `PartitionSpec`.
        seed: of the order of examples and of keys.

    Raises:
        ValueError: if a rule splits an axis that does not divide.
    """

    def __init__(
        self,
        params: Any,
        *,
        collate: Callable[[Sequence[Any]], Any],
        loss: Callable[[Any, Any, Array | None], Array],
        predict: Callable[[Any, Any], Any],
        optimizer: optax.GradientTransformation,
        mesh: Mesh | None = None,
        rule: Rule = partition_by_shape,
        seed: int = 0,
    ) -> None:
        self._collate, self._optimizer, self._mesh, self._seed = collate, optimizer, mesh, seed
        if mesh is not None:
            params = distributed_tree(params, mesh, rule)
        moments, done = on_mesh((optimizer.init(params), jnp.int32(0)), mesh)
        self._state = PipelineState(params, moments, done)
        self._loss = jax.jit(lambda params, batch: loss(params, batch, None))
        self._predict = jax.jit(predict)
        self._step = jax.jit(partial(self._stepped, jax.value_and_grad(loss)), donate_argnums=0)

    @property
    def params(self) -> Any:
        """The parameters as they are now; a copy of nothing, so they are void after the next step."""
        return self._state.params

    @property
    def done(self) -> int:
        """Optimiser steps done."""
        return int(self._state.done)

    def step(self, examples: Sequence[Any]) -> float:
        """One optimiser step on a batch of these examples; its loss before the step.

        Raises:
            ValueError: if the examples do not divide over the axis `data`.
        """
        self._state, loss = self._step(self._state, place_examples(self._collate(examples), self._mesh))
        return float(loss)

    def fit(self, examples: Sequence[Any], *, batch_size: int, epochs: int = 1) -> list[float]:
        """Pass all examples so often, each time in another order; a last batch that is not full is left out.

        A pipeline that was restored goes on after the steps that it has done.

        Returns:
            The loss of every step of this call.

        Raises:
            ValueError: if there are fewer examples than a batch has.
        """
        steps = len(examples) // batch_size
        if steps == 0:
            raise ValueError(f"a batch of {batch_size} needs as many examples; got {len(examples)}")
        losses = []
        for number in range(self.done, epochs * steps):
            epoch, place = divmod(number, steps)
            order = np.random.default_rng([self._seed, epoch]).permutation(len(examples))
            chosen = order[place * batch_size : (place + 1) * batch_size]
            losses.append(self.step([examples[index] for index in chosen]))
        return losses

    def evaluate(self, examples: Sequence[Any]) -> float:
        """The loss of a batch of these examples."""
        return float(self._loss(self._state.params, place_examples(self._collate(examples), self._mesh)))

    def predict(self, examples: Sequence[Any], *, batch_size: int) -> Any:
        """What `predict` gives for all examples, in their order, as numpy arrays on every process.

        A last batch is filled up with its last example, whose answers are left out.
        """
        if not examples:
            raise ValueError("nothing to predict: no examples")
        parts = []
        for start in range(0, len(examples), batch_size):
            chosen = list(examples[start : start + batch_size])
            filled = [*chosen, *[chosen[-1]] * (batch_size - len(chosen))]
            found = self._predict(self._state.params, place_examples(self._collate(filled), self._mesh))
            parts.append(jax.tree.map(whole_array, found))
        return jax.tree.map(lambda *leaves: np.concatenate(leaves)[: len(examples)], *parts)

    def save(self, path: Path) -> None:
        """Write parameters, moments and the number of steps as safetensors; any mesh reads them."""
        save_leaves(self._state, path)

    def restore(self, path: Path) -> None:
        """Take over what `save` wrote, bit for bit.

        Raises:
            ValueError: if it is of another model or optimiser.
        """
        self._state = restore_leaves(self._state, path)

    def _stepped(
        self, differentiated: Callable[..., tuple[Array, Any]], state: PipelineState, batch: Any
    ) -> tuple[PipelineState, Array]:
        key = jax.random.fold_in(jax.random.key(self._seed), state.done)
        loss, gradient = differentiated(state.params, batch, key)
        updates, moments = self._optimizer.update(gradient, state.moments, state.params)
        return PipelineState(optax.apply_updates(state.params, updates), moments, state.done + 1), loss
