"""How a `Trainer` moves weights: AdamW, or Muon for the matrices between embedding and head.

Shapes of expert weights: E experts, D model width, F inner width.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import optax
from jax import Array
from optax.contrib import MuonDimensionNumbers, scale_by_muon

EPSILON = 1e-8
"""As torch and optax have it."""
ADAMW_RMS = 0.2
"""Root mean square of AdamW's updates, which Muon's are scaled to: Liu et al. 2025, arXiv:2502.16982, section 2.2."""
AXES = {
    2: MuonDimensionNumbers(reduction_axis=0, output_axis=1),
    3: MuonDimensionNumbers(reduction_axis=1, output_axis=2),
    4: MuonDimensionNumbers(reduction_axis=1, output_axis=3),
}
"""By the number of axes: [inputs, outputs], [E, F, D], and [E, D, 2, F], where gate and up are two matrices."""


@dataclass(frozen=True, kw_only=True)
class Optimisation:
    """Settings of a `Trainer`.

    Args:
        weight_decay: decoupled decay per unit of learning rate, of matrices only.
        betas: decay of AdamW's first and second moments, each in [0, 1).
        muon_momentum: decay of Muon's momentum, in [0, 1); None where AdamW moves everything.
        clip_norm: largest global gradient norm.
        precision: `float32`, or `bfloat16` for matrix products outside routers; weights stay float32.
        seed: of initial weights and noise.
    """

    weight_decay: float
    betas: tuple[float, float]
    muon_momentum: float | None = None
    clip_norm: float
    precision: str
    seed: int


def directions(how: Optimisation) -> optax.GradientTransformation:
    """What a learning rate times is subtracted from the weights, from their gradients."""
    moved = optax.scale_by_adam(*how.betas, eps=EPSILON)
    if how.muon_momentum is not None:
        matrices = optax.chain(
            # its momentum is corrected for its start, which torch's is not
            scale_by_muon(beta=how.muon_momentum, eps=EPSILON, weight_dimension_numbers=_axes),
            optax.stateless(_with_adamws_size),
        )
        moved = optax.partition({"matrix": matrices, "other": moved}, _kinds)
    decay = optax.add_decayed_weights(how.weight_decay, mask=partial(jax.tree.map, lambda p: p.ndim >= 2))
    return optax.chain(optax.clip_by_global_norm(how.clip_norm), moved, decay)


def _kinds(params: Any) -> Any:
    """Which parameters Muon moves: the same as in the trainer of torch."""

    def kind(path: tuple[Any, ...], leaf: Array) -> str:
        names = jax.tree_util.keystr(path)
        is_outer = any(name in names for name in ("embed_tokens", "lm_head", "router"))
        return "other" if is_outer or leaf.ndim < 2 else "matrix"

    return jax.tree_util.tree_map_with_path(kind, params)


def _axes(updates: Any) -> Any:
    """Which axes of a parameter are those of its matrices."""
    return jax.tree.map(lambda leaf: AXES[leaf.ndim], updates)


def _with_adamws_size(updates: Any, _params: Any) -> Any:
    def scaled(leaf: Array) -> Array:
        axes = AXES[leaf.ndim]
        return leaf * (ADAMW_RMS * math.sqrt(max(leaf.shape[axes.reduction_axis], leaf.shape[axes.output_axis])))

    return jax.tree.map(scaled, updates)
