"""Balance losses and the z-loss from the routers' raw statistics; twin of `routing.losses`, whose conventions hold.

Shapes: T tokens, E FFN experts, R routable experts, B sequences.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import Array

from .assignment import RouterStats


def switch_balance_loss(stats: RouterStats) -> Array:
    """Load shares times mean probabilities over target shares, summed."""
    return _dot(_share(stats.chosen.count_R), stats)


def null_averaged_balance_loss(stats: RouterStats) -> Array:
    """The Switch loss with one common load for all zero-compute experts. Source: AdaMoE, arXiv:2406.13233, eq. 6."""
    share_R, E = _share(stats.chosen.count_R), stats.chosen.E
    if stats.chosen.Z:
        share_R = share_R.at[E:].set(share_R[E:].mean())
    return _dot(share_R, stats)


def first_choice_balance_loss(stats: RouterStats) -> Array:
    """The Switch loss with the load of first choices only."""
    is_it_TR = stats.chosen.expert_TK[:, :1] == jnp.arange(stats.chosen.num_routable)
    return _dot(_share(is_it_TR.sum(axis=0)), stats)


def sequence_balance_loss(stats: RouterStats) -> Array:
    """The Switch loss of each sequence by itself, averaged over sequences. Source: DeepSeek-V3, eqs. 17-20."""
    R, K, B = stats.chosen.num_routable, stats.chosen.expert_TK.shape[1], stats.batch_size
    valid_TR = jnp.ones_like(stats.probability_TR)
    if stats.is_valid_T is not None:
        valid_TR = valid_TR * stats.is_valid_T[:, None]
    chosen_TKR = stats.chosen.expert_TK[:, :, None] == jnp.arange(R)
    count_BR = rearrange(chosen_TKR, "(b s) k r -> b (s k) r", b=B).sum(axis=1)
    total_BR = rearrange(stats.probability_TR * valid_TR, "(b s) r -> b s r", b=B).sum(axis=1)
    token_B1 = rearrange(valid_TR[:, :1], "(b s) 1 -> b s 1", b=B).sum(axis=1)
    divisor_B1 = jnp.maximum(token_B1, 1)
    loss_B = R * (count_BR / (K * divisor_B1) * total_BR / divisor_B1).sum(axis=-1)
    return loss_B.sum() / jnp.maximum((token_B1 > 0).sum(), 1)


def entropy_balance_loss(stats: RouterStats) -> Array:
    """Negative entropy of the batch-mean softmax of the logits. Source: sigma-MoE, arXiv:2310.10837, eqs. 20-21."""
    mean_R = stats.mean_of_valid(jax.nn.softmax(stats.logit_TR))
    # the slope of entropy is infinite at 0, where an expert that no token gives any probability stands
    return -jax.scipy.special.entr(jnp.where(mean_R > 0, mean_R, 1.0)).sum()


def no_balance_loss(stats: RouterStats) -> Array:
    """Nothing: for routers that a bias balances."""
    return jnp.zeros((), jnp.float32)


BALANCE_LOSSES: dict[str, Callable[[RouterStats], Array]] = {
    "switch": switch_balance_loss,
    "null_averaged": null_averaged_balance_loss,
    "first_choice": first_choice_balance_loss,
    "sequence": sequence_balance_loss,
    "entropy": entropy_balance_loss,
    "none": no_balance_loss,
}


def z_loss(stats: RouterStats) -> Array:
    """Mean squared log-partition of the router logits."""
    return stats.mean_of_valid(jnp.square(jax.nn.logsumexp(stats.logit_TR, axis=-1)))


def auxiliary_loss(stats: Sequence[RouterStats], *, balance_weight: float, z_weight: float) -> Array:
    """The weighted sum of each router's balance loss and the z-loss, averaged over layers.

    A router's own penalty, which it weighs itself, is added as it is.
    """
    per_layer = []
    for layer in stats:
        loss = balance_weight * BALANCE_LOSSES[layer.balance_loss](layer) + z_weight * z_loss(layer)
        per_layer.append(loss if layer.penalty is None else loss + layer.penalty)
    return jnp.stack(per_layer).mean()


def _share(count_R: Array) -> Array:
    return count_R / jnp.maximum(count_R.sum(), 1)


def _dot(share_R: Array, stats: RouterStats) -> Array:
    product_R = share_R * stats.probability_R
    if stats.target_share_R is None:
        return share_R.shape[0] * product_R.sum()
    return (product_R / stats.target_share_R).sum()
