"""How many recursions a token gets: depth routers of a mixture of recursions, and what trains them.

Shapes: B batch, S positions, D model width, J recursions.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid, one_hot

from routing import ExactBuffers, normalised

RouterKind = Literal["linear", "mlp"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Depth:
    """One decision of a depth router.

    Args:
        is_alive_BS: the tokens that go on; in token choice, per recursion [J, B, S].
        gate_BS: what multiplies the block's output, with gradient.
        losses: by name, already weighted; empty outside training.
    """

    is_alive_BS: Tensor
    gate_BS: Tensor
    losses: dict[str, Tensor] = field(default_factory=dict)


class ExpertChoiceDepth(nn.Module):
    """One scalar router per recursion; each recursion picks its best tokens among those that the one before picked.

    In training recursion r takes the `(J - r) / J` best of the whole row, which looks ahead. `threshold` takes, outside
    training, every token whose raw logit is positive, which is causal and what the loss trains the logit for; `top_k`
    keeps the training rule, which is how the published numbers were evaluated. Recursion 0 takes every token in both.

    Args:
        width: D, of the hidden states that routers read.
        recursions: J, one router each.
        kind: of the routers, see `build_router`.
        inference: the rule outside training, `threshold` or `top_k`.
        predictor: `own` thresholds the router's own logit; `separate` that of a second router, which sees detached
            inputs.
        alpha: scale of the sigmoid gate.
        loss_weight: of the binary cross entropy of the logit against having been picked, mean over tokens and
            recursions.
        z_weight: of the squared logit.

    Source: Bae et al. 2025 (Mixture-of-Recursions), arXiv:2507.10524, section 2.2.1 and table 2.
    """

    def __init__(
        self,
        width: int,
        recursions: int,
        *,
        kind: RouterKind = "linear",
        inference: str = "threshold",
        predictor: str = "own",
        alpha: float = 0.1,
        loss_weight: float = 1e-3,
        z_weight: float = 0.0,
    ) -> None:
        super().__init__()
        self.recursions, self.inference, self.alpha = recursions, inference, alpha
        self.loss_weight, self.z_weight = loss_weight, z_weight
        self.routers = nn.ModuleList(build_router(kind, width, 1) for _ in range(recursions))
        separate = predictor == "separate"
        self.predictors = nn.ModuleList(build_router(kind, width, 1) for _ in range(recursions)) if separate else None

    @property
    def is_causal(self) -> bool:
        return self.inference == "threshold"

    def forward(
        self, recursion: int, x_BSD: Tensor, is_candidate_BS: Tensor, is_valid_BS: Tensor, is_training: bool
    ) -> Depth:
        """Which candidates recursion `recursion` (from 0) takes."""
        logit_BS = _logits(self.routers[recursion], x_BSD)[..., 0]
        predicted_BS = logit_BS
        if self.predictors is not None:
            predicted_BS = _logits(self.predictors[recursion], x_BSD.detach())[..., 0]
        if recursion == 0:
            is_alive_BS = is_candidate_BS
        elif is_training or self.inference == "top_k":
            is_alive_BS = best_of_row(logit_BS, is_candidate_BS, self.capacity(recursion, is_valid_BS))
        else:
            is_alive_BS = is_candidate_BS & (predicted_BS > 0)
        losses = self._losses(logit_BS, predicted_BS, is_candidate_BS, is_alive_BS) if is_training else {}
        return Depth(is_alive_BS=is_alive_BS, gate_BS=self.alpha * logit_BS.sigmoid(), losses=losses)

    def capacity(self, recursion: int, is_valid_BS: Tensor) -> Tensor:
        """int64 [B]: the share `(J - r) / J` of a row's tokens, padding not counted; at least one."""
        length_B = is_valid_BS.sum(dim=1)
        share_B = (self.recursions - recursion) * length_B // self.recursions
        return torch.minimum(share_B.clamp_min(1), length_B)

    def _losses(
        self, logit_BS: Tensor, predicted_BS: Tensor, asked_BS: Tensor, is_alive_BS: Tensor
    ) -> dict[str, Tensor]:
        if not asked_BS.any():
            return {}
        target = is_alive_BS[asked_BS].to(predicted_BS.dtype)
        entropy = binary_cross_entropy_with_logits(predicted_BS[asked_BS], target)
        losses = {"depth": self.loss_weight / self.recursions * entropy}
        if self.z_weight:
            losses["depth_z"] = self.z_weight / self.recursions * logit_BS[asked_BS].square().mean()
        return losses


class TokenChoiceDepth(ExactBuffers):
    """One router that gives every token its number of recursions before the first; causal.

    Args:
        width: D, of the hidden states that the router reads.
        recursions: J, the depths that it scores.
        kind: of the router, see `build_router`.
        score: activation of the logits, `softmax` or `sigmoid`.
        balance: `loss` adds `J * sum f_j P_j`; `bias` moves a selection bias towards equal depths after each step.
        alpha: scale of the gate.
        loss_weight: of the balance loss.
        z_weight: of the squared log-partition.
        bias_rate: step of the bias.

    Source: Bae et al. 2025 (Mixture-of-Recursions), arXiv:2507.10524, section 2.2.1 and table 2; the bias is that of
    Wang et al. 2024, arXiv:2408.15664, algorithm 1.
    """

    is_causal = True

    def __init__(
        self,
        width: int,
        recursions: int,
        *,
        kind: RouterKind = "mlp",
        score: str = "softmax",
        balance: str = "loss",
        alpha: float = 1.0,
        loss_weight: float = 0.1,
        z_weight: float = 1e-5,
        bias_rate: float = 1e-3,
    ) -> None:
        super().__init__()
        self.recursions, self.score, self.balance, self.alpha = recursions, score, balance, alpha
        self.loss_weight, self.z_weight, self.bias_rate = loss_weight, z_weight, bias_rate
        self.router = build_router(kind, width, recursions)
        self.bias_J: Tensor | None
        self.register_buffer("bias_J", torch.zeros(recursions) if balance == "bias" else None)
        self.register_buffer("count_J", torch.zeros(recursions), persistent=False)

    def forward(self, x_BSD: Tensor, is_valid_BS: Tensor, is_training: bool) -> Depth:
        """How deep every token goes; `is_alive_BS` is [J, B, S]."""
        logit_BSJ = _logits(self.router, x_BSD)
        score_BSJ = logit_BSJ.softmax(dim=-1) if self.score == "softmax" else logit_BSJ.sigmoid()
        biased_BSJ = score_BSJ.detach() if self.bias_J is None else score_BSJ.detach() + self.bias_J
        last_BS = biased_BSJ.argmax(dim=-1)
        gate_BS = self.alpha * score_BSJ.gather(-1, last_BS[..., None])[..., 0]
        is_alive = torch.stack([is_valid_BS & (last_BS >= recursion) for recursion in range(self.recursions)])
        losses = {}
        if is_training:
            count_J = one_hot(last_BS[is_valid_BS], self.recursions).sum(dim=0)
            self.count_J += count_J
            losses = self._losses(logit_BSJ[is_valid_BS], score_BSJ[is_valid_BS], count_J)
        return Depth(is_alive_BS=is_alive, gate_BS=gate_BS, losses=losses)

    @torch.no_grad()
    def post_step(self) -> None:
        """Move the bias of depths that were chosen too rarely up, of the others down."""
        if self.bias_J is not None:
            self.bias_J += self.bias_rate * (self.count_J.mean() - self.count_J).sign()
        self.count_J.zero_()

    def _losses(self, logit_TJ: Tensor, score_TJ: Tensor, count_J: Tensor) -> dict[str, Tensor]:
        losses = {}
        if self.balance == "loss":
            # the logarithms are those of sigmoid scores; a softmax needs none, as it sums to 1
            probability_J = normalised(score_TJ, lambda: logsigmoid(logit_TJ).softmax(dim=-1)).mean(dim=0)
            share_J = count_J.to(probability_J) / count_J.sum().clamp_min(1)
            losses["depth"] = self.loss_weight * self.recursions * (share_J * probability_J).sum()
        if self.z_weight:
            losses["depth_z"] = self.z_weight * logit_TJ.logsumexp(dim=-1).square().mean()
        return losses


def build_router(kind: RouterKind, width: int, outputs: int) -> nn.Module:
    """A linear map without bias, or a GELU network as wide as the model."""
    if kind == "linear":
        return nn.Linear(width, outputs, bias=False)
    return nn.Sequential(nn.Linear(width, width, bias=False), nn.GELU(), nn.Linear(width, outputs, bias=False))


def best_of_row(score_BS: Tensor, is_candidate_BS: Tensor, most_B: Tensor) -> Tensor:
    """bool [B, S]: the `most_B` best-scored candidates of each row; the earlier one of equals."""
    masked_BS = score_BS.detach().masked_fill(~is_candidate_BS, -torch.inf)
    order_BS = masked_BS.argsort(dim=1, descending=True, stable=True)
    rank_BS = order_BS.argsort(dim=1)
    return is_candidate_BS & (rank_BS < most_B[:, None])


def _logits(router: nn.Module, x: Tensor) -> Tensor:
    """In the weights' precision, autocast or not."""
    with torch.autocast(x.device.type, enabled=False):
        return router(x.to(next(router.parameters()).dtype)).float() if x.dtype != torch.float64 else router(x)
