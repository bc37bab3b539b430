"""MoE-X's router: it has no parameters, but predicts from the experts' weights which of them would be sparsest.

Shapes: T tokens, K slots, E experts, D model width, F expert width.
"""

from typing import Any

import torch
from torch import Tensor

from routing import Carry, RouterModule, RouterSizes, RouterStats, Routing, RoutingContext, top_experts

from ..experts.relu import ReluExperts

# far below any variance of trained pre-activations; keeps the score of a token of zeros finite
LEAST_VARIANCE = 1e-12


class SparsityRouter(RouterModule):
    """Top-k of the negative expected activity; weights are the softmax over the k.

    Over an expert's F hidden units, the pre-activations of a token x are taken to be normal with mean `mean_D . x` and
    variance `variance_D . x^2`, where mean and variance are those of the units' weights per input. The expected share
    of active units is then `(1 + erf(m / (sqrt(2) s))) / 2`, and the score is `-erf(m / (sqrt(2) s))`.

    In training the statistics are computed from the weights, so that the loss reaches them through the scores. Outside
    training they are buffers, refreshed after every optimiser step and whenever weights may have changed in training;
    they are saved with the model, so that it runs without holding its experts. `refresh` brings them up to date after
    weights were changed by hand.

    Args:
        sizes: D, E, K, L.
        layer: which MoE layer this router serves.
        experts: whose weights are looked at.

    Raises:
        ValueError: if there are zero-compute experts, which have no hidden units.

    Source: Yang et al. 2025 (MoE-X), arXiv:2503.07639, section 4.2.
    """

    balance_loss = "switch"

    def __init__(self, sizes: RouterSizes, layer: int, experts: ReluExperts) -> None:
        super().__init__(sizes, layer)
        if sizes.zero_compute:
            raise ValueError(
                "the router predicts how many hidden units of an expert are active; zero-compute experts have none, "
                "leave zero_compute_experts empty"
            )
        self._experts = (experts,)  # registered in its layer; in a tuple, or torch would register it here as well
        for name in ("mean_ED", "variance_ED"):
            self.register_buffer(name, torch.zeros(sizes.num_experts, sizes.width))
        self.register_buffer("is_current", torch.tensor(False))

    def forward(self, x_TD: Tensor, carry: Carry, context: RoutingContext) -> tuple[Routing, Carry, RouterStats]:
        with torch.autocast(x_TD.device.type, enabled=False):
            score_TE = self.score(x_TD, *self._statistics(context.is_training))
            score_TE = self.biased(score_TE, context)
            expert_TK = top_experts(score_TE.detach(), self.top_k(context))
            weight_TK = score_TE.gather(-1, expert_TK).softmax(dim=-1)
            routing = self.routing(expert_TK, weight_TK)
            if context.is_valid_T is not None:
                routing = routing.drop(~context.is_valid_T[:, None].expand_as(expert_TK))
            stats = self.stats(routing, routing, context, probability_TR=score_TE.softmax(dim=-1), logit_TR=score_TE)
        return routing, carry, stats

    def score(self, x_TD: Tensor, mean_ED: Tensor, variance_ED: Tensor) -> Tensor:
        """[T, E] in [-1, 1]: 1 if no unit is expected to be active, -1 if all are."""
        x_TD = x_TD.to(mean_ED.dtype)
        mean_TE = x_TD @ mean_ED.T
        deviation_TE = (x_TD.square() @ variance_ED.T).clamp_min(LEAST_VARIANCE).sqrt()
        return -torch.erf(mean_TE / (2**0.5 * deviation_TE))

    def refresh(self) -> None:
        """Compute the buffers from the experts' weights.

        Raises:
            ValueError: if the weights are not in memory.
        """
        if self._weights() is None:
            raise ValueError(
                "the statistics of the experts' weights are not up to date and the weights are not in memory; "
                "load the model whole once and save it again"
            )
        with torch.no_grad():
            self.mean_ED, self.variance_ED = self._computed()
            self.is_current.fill_(True)

    def post_step(self, count_R: Tensor, num_tokens: int) -> None:
        """The weights have changed."""
        self.refresh()

    def _weights(self) -> Tensor | None:
        weights = getattr(self._experts[0], "up_proj", None)
        return None if weights is None or weights.is_meta else weights

    def _computed(self) -> tuple[Tensor, Tensor]:
        up_EFD = self._experts[0].up_proj
        up_EFD = up_EFD if up_EFD.dtype == torch.float64 else up_EFD.float()
        return up_EFD.mean(dim=1), up_EFD.var(dim=1, correction=0)

    def _statistics(self, is_training: bool) -> tuple[Tensor, Tensor]:
        if is_training:
            self.is_current.fill_(False)
            return self._computed()
        if not self.is_current:
            self.refresh()
        return self.mean_ED, self.variance_ED

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        if not self.is_current.is_meta and not self.is_current and self._weights() is not None:
            self.refresh()
        super()._save_to_state_dict(*args, **kwargs)
