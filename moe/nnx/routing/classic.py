"""ClassicRouter: twin of `routing.ClassicRouter`.

Shapes: T tokens, D model width, K experts per token, E FFN experts, R = E + Z routable experts.
"""

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax import Array, lax

from routing import ClassicRule, RouterSizes

from ..parts.dense import normal
from .assignment import Carry, RouterStats, Routing, RoutingContext
from .capacity import CAPACITY_POLICIES, limit_capacity, share_capacity_R, tutel_capacity
from .normalise import as_shares, masked_softmax, normalised


class ClassicRouter(nnx.Module):
    """Linear scorer, top-k selector, weigher; computes in float32.

    Args:
        sizes: D, E, Z, K, L.
        layer: which MoE layer this router serves.
        rule: how logits become a routing.
        std: of the initial weights, unless the rule has its own.
        rngs: random streams.
        score_width: what the scores are linear in, if not the D-wide hidden state.
    """

    def __init__(
        self,
        sizes: RouterSizes,
        layer: int,
        rule: ClassicRule,
        std: float,
        rngs: nnx.Rngs,
        score_width: int | None = None,
    ) -> None:
        self.sizes, self.layer, self.rule = sizes, layer, rule
        shape = (sizes.num_routable, score_width or sizes.width)
        std = std if rule.initial.init_scale is None else (rule.initial.init_scale / shape[1]) ** 0.5
        self.weight = initial(rule, rngs, shape, std)
        self.bias_R = nnx.Variable(jnp.zeros(sizes.num_routable, jnp.float32)) if rule.balance.bias_rate else None

    def __call__(self, x_TD: Array, carry: Carry, context: RoutingContext) -> tuple[Routing, Carry, RouterStats]:
        """Route the normed inputs of this layer's experts."""
        logit_TR, carry = self.logits(self._jitter(x_TD.astype(jnp.float32), context), carry)
        probability_TR, score_TR = self._score(logit_TR)
        expert_TK = self._select(lax.stop_gradient(score_TR))
        chosen = Routing(
            expert_TK=expert_TK,
            weight_TK=self._weigh(score_TR, logit_TR, expert_TK),
            E=self.sizes.num_experts,
            Z=self.sizes.num_zero_compute,
        )
        if context.is_valid_T is not None:
            chosen = chosen.drop(~context.is_valid_T[:, None])
        kept = self._drop_overflow(chosen, context) if context.is_training else chosen
        stats = RouterStats(
            probability_TR=probability_TR,
            logit_TR=logit_TR,
            chosen=chosen,
            kept=kept,
            is_valid_T=context.is_valid_T,
            target_share_R=None
            if self.rule.balance.ffn_share == 1
            else jnp.asarray(self._target_share_R(), jnp.float32),
            batch_size=context.batch_size,
            balance_loss=self.rule.balance.balance_loss,
            penalty=self.penalty(probability_TR, chosen, context),
        )
        return kept, carry, stats

    def logits(self, x_TD: Array, carry: Carry) -> tuple[Array, Carry]:
        """[T, R] scores before any activation, and what the next layer's router is told."""
        return x_TD @ self.weight[...].astype(jnp.float32).T, carry

    def penalty(self, probability_TR: Array, chosen: Routing, context: RoutingContext) -> Array | None:
        """Losses that the router weighs itself, over valid tokens. None for none."""
        return None

    def post_step(self, count_R: Array) -> None:
        """Move the balancing bias towards the mean load, or the FFN experts' bias towards the target load.

        Source: Wang et al. 2024, arXiv:2408.15664, algorithm 1; with `target_load`, Meituan 2025 (LongCat-Flash),
        arXiv:2509.01322, section 2.1.1.
        """
        if self.bias_R is None:
            return
        load_R, bias_R, rate = count_R.astype(jnp.float32), self.bias_R[...], self.rule.balance.bias_rate
        if self.rule.balance.target_load is None:
            self.bias_R[...] = bias_R + rate * jnp.sign(load_R.mean() - load_R)
        else:
            E = self.sizes.num_experts
            target_share = self.rule.balance.target_load / self.sizes.top_k / E
            error_E = target_share - load_R[:E] / jnp.maximum(load_R.sum(), 1)
            self.bias_R[...] = bias_R.at[:E].add(rate * error_E)

    def _score(self, logit_TR: Array) -> tuple[Array, Array]:
        """The distribution that the balance loss sees, and the scores that select and weigh."""
        if self.rule.scoring.score in LOG_SCORES:
            log_TR = LOG_SCORES[self.rule.scoring.score](logit_TR)
            is_sigmoid = self.rule.scoring.score == "sigmoid"
            score_TR = jax.nn.sigmoid(logit_TR) if is_sigmoid else jnp.exp(log_TR)
            return normalised(score_TR, jax.nn.softmax(log_TR)), score_TR
        probability_TR = jax.nn.softmax(logit_TR)
        return probability_TR, logit_TR if self.rule.scoring.score == "selected_softmax" else probability_TR

    def _select(self, score_TR: Array) -> Array:
        """int32 [T, K], best first. The balancing bias acts here and nowhere else."""
        if self.bias_R is not None:
            score_TR = score_TR + self.bias_R[...]
        if self.rule.grouping.num_groups > 1:
            score_TR = self._mask_groups(score_TR)
        return lax.top_k(score_TR, self.sizes.top_k)[1]

    def _weigh(self, score_TR: Array, logit_TR: Array, expert_TK: Array) -> Array:
        """[T, K] from the unbiased scores of the selected experts."""
        weight_TK = jnp.take_along_axis(score_TR, expert_TK, axis=-1)
        counts_TK = self._counts_in_sum(expert_TK)
        if self.rule.scoring.score == "selected_softmax":
            weight_TK = masked_softmax(weight_TK, counts_TK)
        elif self.rule.scoring.renormalise:
            log_TR = LOG_SCORES.get(self.rule.scoring.score, lambda logit_TR: logit_TR)(logit_TR)
            by_logarithms_TK = masked_softmax(jnp.take_along_axis(log_TR, expert_TK, axis=-1), counts_TK)
            weight_TK = normalised(jnp.where(counts_TK, weight_TK, 0.0), by_logarithms_TK)
        return weight_TK * self.rule.scoring.scale

    def _drop_overflow(self, chosen: Routing, context: RoutingContext) -> Routing:
        """The routing within the capacity of the rule."""
        if self.rule.capacity.capacity_factor is None:
            return chosen
        rank_TK = CAPACITY_POLICIES[self.rule.capacity.capacity_policy](chosen, self._key(context, 1))
        kept = limit_capacity(chosen, self._capacity(chosen, context), rank_TK)
        if not self.rule.capacity.renormalise_kept:
            return kept
        weight_TK = as_shares(kept.weight_TK) * self.rule.scoring.scale
        return Routing(expert_TK=kept.expert_TK, weight_TK=weight_TK, E=kept.E, Z=kept.Z)

    def _jitter(self, x_TD: Array, context: RoutingContext) -> Array:
        if not (context.is_training and self.rule.scoring.jitter):
            return x_TD
        key = self._key(context, 0)
        if key is None:
            raise ValueError("this router's jitter draws numbers in training; give the model a key")
        return x_TD * jax.random.uniform(
            key, x_TD.shape, minval=1 - self.rule.scoring.jitter, maxval=1 + self.rule.scoring.jitter
        )

    def _key(self, context: RoutingContext, use: int) -> Array | None:
        return None if context.key is None else jax.random.fold_in(context.key, 2 * self.layer + use)

    def _mask_groups(self, score_TR: Array) -> Array:
        """Scores with -inf outside each token's best groups. Source: DeepSeek-V3, arXiv:2412.19437, section 2.1.2."""
        groups, kept = self.rule.grouping.num_groups, self.rule.grouping.groups_kept
        grouped = rearrange(score_TR, "t (g r) -> t g r", g=groups)
        num_best = 2 if self.rule.grouping.group_score == "top2" and grouped.shape[-1] > 1 else 1
        best_TG = lax.top_k(grouped, num_best)[0].sum(axis=-1)
        is_kept_TG = (lax.top_k(best_TG, kept)[1][:, :, None] == jnp.arange(groups)).any(axis=1)
        return rearrange(jnp.where(is_kept_TG[..., None], grouped, -jnp.inf), "t g r -> t (g r)")

    def _counts_in_sum(self, expert_TK: Array) -> Array:
        """Which selected slots the normalising sum runs over."""
        E, kinds = self.sizes.num_experts, self.sizes.zero_compute
        if self.rule.scoring.normalise_over == "selected":
            counts_R = [True] * (E + len(kinds))
        else:
            counts_R = [True] * E + [self.rule.scoring.normalise_over == "nonzero" and kind != "zero" for kind in kinds]
        return jnp.asarray(counts_R)[expert_TK]

    def _capacity(self, chosen: Routing, context: RoutingContext) -> Array:
        num_tokens, top_k = chosen.expert_TK.shape
        if context.is_valid_T is not None:
            num_tokens = context.is_valid_T.sum()
        factor = self.rule.capacity.capacity_factor
        if self.rule.capacity.capacity_rule == "tutel":
            return tutel_capacity(factor, count_R=chosen.count_R, num_tokens=num_tokens, top_k=top_k)
        return share_capacity_R(factor, num_tokens * top_k, self._target_share_R())

    def _target_share_R(self) -> np.ndarray:
        """The load share that each routable expert should take; sums to 1."""
        share_R = np.ones(self.sizes.num_routable)
        share_R[: self.sizes.num_experts] = self.rule.balance.ffn_share
        return share_R / share_R.sum()


def log_sqrt_softplus(logit: Array) -> Array:
    """The logarithm of `sqrt(log(1 + e^z))`; see `routing.choice.normalise`."""
    near = jnp.log(jax.nn.softplus(jnp.maximum(logit, FAR_BELOW)))
    return jnp.where(logit > FAR_BELOW, near, logit) / 2


FAR_BELOW = -20.0  # as in `routing.choice.normalise`
LOG_SCORES = {"sigmoid": jax.nn.log_sigmoid, "sqrt_softplus": log_sqrt_softplus}


def initial(rule: ClassicRule, rngs: nnx.Rngs, shape: tuple[int, int], std: float) -> nnx.Param:
    """The distributions of `init`, see `routing.routers.classic.rule.Initial`."""
    if rule.initial.init == "normal":
        return normal(rngs, shape, std)
    if rule.initial.init == "kaiming":
        return nnx.Param(jax.random.uniform(rngs.params(), shape, jnp.float32, -1, 1) / shape[1] ** 0.5)
    cut = rule.initial.init_cut
    return nnx.Param(std * jax.random.truncated_normal(rngs.params(), -cut, cut, shape, jnp.float32))


def _inner(rule: ClassicRule, rngs: nnx.Rngs, shape: tuple[int, int], std: float) -> nnx.Param:
    """A matrix of RMoE before its scores: normal, unless all of them start as torch's own layers do."""
    return initial(rule, rngs, shape, std) if rule.initial.init == "kaiming" else normal(rngs, shape, std)
