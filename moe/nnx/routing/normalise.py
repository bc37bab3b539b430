"""Scores divided by their sum, also where that sum vanishes; twin of `routing.choice.normalise`.

Shapes: T tokens, K slots or experts that are summed over.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

TINY = float(np.finfo(np.float32).tiny)
LEAST_SUM = 2.0**-64  # as in `routing.choice.normalise`, which says why


def normalised(score_TK: Array, by_logarithms_TK: Array) -> Array:
    """`score / sum(score)`; by logarithms where that sum nearly vanishes. Twin of `routing.normalised`."""
    sum_T1 = score_TK.sum(axis=-1, keepdims=True)
    is_small_T1 = sum_T1 < LEAST_SUM
    return jnp.where(is_small_T1, by_logarithms_TK, score_TK / jnp.where(is_small_T1, 1.0, sum_T1))


def as_shares(weight_TK: Array) -> Array:
    """Weights divided by their sum; all 0 where none is left. Rows with a sum below `LEAST_SUM` pass no gradient."""
    sum_T1 = weight_TK.sum(axis=-1, keepdims=True)
    share_TK = weight_TK / jnp.maximum(sum_T1, TINY)
    return jnp.where(sum_T1 < LEAST_SUM, lax.stop_gradient(share_TK), share_TK)


def masked_softmax(logit_TK: Array, counts_TK: Array) -> Array:
    """Softmax over the slots that count; 0 elsewhere and in rows where none counts. Other slots get no gradient."""
    any_T1 = counts_TK.any(axis=-1, keepdims=True)
    masked_TK = jnp.where(any_T1, jnp.where(counts_TK, logit_TK, -jnp.inf), 0.0)
    return jnp.where(counts_TK, jax.nn.softmax(masked_TK), 0.0)
