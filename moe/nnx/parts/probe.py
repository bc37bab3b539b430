"""Compiled calls to measure the twin with, for callers that do not import jax.

Shapes: N sorted rows, E experts, D and F input and output width.
"""

from collections.abc import Callable

import jax
import numpy as np

from .grouped import GROUPED_PRODUCTS

Call = Callable[[], tuple[np.ndarray, ...]]


def grouped_product_calls(E: int, N: int, D: int, F: int, *, seed: int = 0) -> dict[str, dict[str, Call]]:
    """For each grouped product, a `forward` and a `gradient` (forward, and both of its derivatives) on random rows.

    Args:
        E, N, D, F: sizes; rows choose their expert uniformly.
        seed: seed of rows, weights and group sizes.

    Returns:
        Calls that return when the work is done; the same for every product, so results can be compared.
    """
    generator = np.random.default_rng(seed)
    x_ND, dy_NF = (generator.standard_normal((N, width), np.float32) for width in (D, F))
    weight_EDF = generator.standard_normal((E, D, F), np.float32) / D**0.5
    count_E = np.bincount(generator.integers(0, E, N), minlength=E).astype(np.int32)
    arrays = [jax.device_put(array) for array in (x_ND, weight_EDF, count_E, dy_NF)]
    calls = {}
    for name, product in GROUPED_PRODUCTS.items():

        def forward(x_ND, weight_EDF, count_E, dy_NF, product=product):
            return product(x_ND, weight_EDF, count_E)

        def loss(x_ND, weight_EDF, count_E, dy_NF, product=product):
            return (product(x_ND, weight_EDF, count_E) * dy_NF).sum()

        compiled = {"forward": jax.jit(forward), "gradient": jax.jit(jax.grad(loss, argnums=(0, 1)))}
        calls[name] = {what: _finished(function, arrays) for what, function in compiled.items()}
    return calls


def _finished(function: Callable, arrays: list[jax.Array]) -> Call:
    def call() -> tuple[np.ndarray, ...]:
        return tuple(jax.tree.leaves(jax.block_until_ready(function(*arrays))))

    return call
