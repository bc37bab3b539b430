"""Prompt-routed pruning: a router reads a prompt and picks one of N codes, each of which is a subnet of a frozen model.

A code has one number per layer (is it there?) and one per hidden unit (is it there?). A bit is the rounded
`sigmoid((number + offset + noise) / temperature)`, with Gumbel noise in training and its median outside, and gradients
as if it were not rounded. An untrained code keeps everything. A predictor maps a prompt's embedding to a code of its
own, and the nearest of the N is taken: in training under an optimal transport that uses all codes alike.

    loss = CE + distillation_weight * KL(model || subnet) + budget_weight * |ln(share / budget)|
         + contrast_weight * H(softmax(prompt likeness), softmax(code likeness))
         + agreement_weight * H(transport, softmax(likeness to the codes))

Codes learn from the first three terms, the predictor from the others: likeness of prompts becomes likeness of codes,
and a prompt alone finds the code that the transport gave it in a batch.

Source: Ganjdanesh et al. 2025 (APTP), arXiv:2406.12042, section 3, there for diffusion models; temperature, offset and
transport as in its code. Ours: text, bits of layers drawn one by one, likeness not weighed by cost, the contrast as a
cross entropy of distributions, the frozen model's own first layer as the prompt's encoder, and the agreement: without
it nine of ten prompts of a trial took the code that keeps most, whatever the transport had given them.

Shapes: B sequences, S positions, D model width, F hidden units of the dense feed-forward, L layers, N codes, A depth
and width numbers of a code.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy, kl_div, log_softmax, normalize

from ..model.decoder import MoEForCausalLM
from .subnet import DOWN, Subnet, carve, expect_dense

MEDIAN_NOISE = -math.log(math.log(2))
"""Of the Gumbel distribution."""
CODE_GAIN = 10.0
"""Codes must move by units, networks by thousandths: what one learning rate gives both is scaled by this."""
INNER_WIDTH = 64
"""Of the predictor; not tuned."""


@dataclass(frozen=True, kw_only=True)
class PromptPlan:
    """Codes and their training.

    Args:
        codes: N, subnets to choose from; at least 1.
        budget: share of the operations of the decoder layers' matrices that a prompt may take on average, in (0, 1].
        transports: whether training assigns prompts by optimal transport; otherwise to the nearest code.
        temperature, offset: of the bits.
        transport_scale, transport_rounds: of the entropic transport, and its normalisations.
        prompt_temperature, code_temperature: of the softmaxes over likenesses.
        distillation_weight, budget_weight, contrast_weight, agreement_weight: of the loss's terms; not tuned.

    Raises:
        ValueError: if a number is out of range.
    """

    codes: int = 4
    budget: float = 0.6
    transports: bool = True
    temperature: float = 0.4
    offset: float = 2.0
    transport_scale: float = 0.05
    transport_rounds: int = 3
    prompt_temperature: float = 0.1
    code_temperature: float = 0.1
    distillation_weight: float = 1.0
    budget_weight: float = 4.0
    contrast_weight: float = 1.0
    agreement_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.codes < 1 or self.transport_rounds < 1:
            raise ValueError(
                f"codes and transport_rounds must be at least 1; got {self.codes} and {self.transport_rounds}"
            )
        if not 0 < self.budget <= 1:
            raise ValueError(f"budget must lie in (0, 1]; got {self.budget:g}")
        for name in ("temperature", "transport_scale", "prompt_temperature", "code_temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0; got {getattr(self, name):g}")


class PromptPruner(nn.Module):
    """The router and its codes, for one frozen dense model; its parameters are what is trained.

    Args:
        model: a dense decoder of ours; its weights are frozen.
        plan: codes and losses.
        seed: of the codes, the predictor and the noise.

    Raises:
        ValueError: if the model is not dense.
    """

    def __init__(self, model: MoEForCausalLM, plan: PromptPlan, seed: int = 0) -> None:
        super().__init__()
        expect_dense(model)
        self._model = (model.requires_grad_(False),)  # in a tuple, or its weights would count as the pruner's
        self.plan, self.generator = plan, torch.Generator().manual_seed(seed)
        self.L, self.F = model.config.num_hidden_layers, model.config.moe_intermediate_size
        first = Subnet((0,), (torch.arange(self.F),))
        self._reader = (carve(model, first).eval().requires_grad_(False),)
        D, A = model.config.hidden_size, self.L * (1 + self.F)
        sizes = ((INNER_WIDTH, D), (A, INNER_WIDTH), (plan.codes, A))
        inner, outer, codes = (torch.randn(*size, generator=self.generator) * size[1] ** -0.5 for size in sizes)
        self.inner, self.outer = nn.Parameter(inner.to(model.dtype)), nn.Parameter(outer.to(model.dtype))
        self.codes = nn.Parameter(codes.to(model.dtype) / CODE_GAIN)
        attention = sum(p.numel() for p in model.model.layers[0].self_attn.parameters() if p.ndim > 1)
        self.attention_share = attention / (attention + 3 * D * self.F)

    @torch.no_grad()
    def embed(self, prompt_BS: Tensor) -> Tensor:
        """[B, D]: the mean over a prompt of the normed stream after the first layer."""
        output, _ = self._reader[0].model(prompt_BS, use_cache=False)
        return output.x_BSD.mean(dim=1)

    def predicted(self, embedding_BD: Tensor) -> Tensor:
        """[B, A]: the code that the predictor would give each prompt."""
        hidden = (normalize(embedding_BD, dim=-1) * embedding_BD.shape[-1] ** 0.5 @ self.inner.T).relu()
        return hidden @ self.outer.T

    def bits(self, number_NA: Tensor) -> tuple[Tensor, Tensor]:
        """Of codes, soft bits in (0, 1) of layers [N, L] and of units [N, L, F]; noisy in training."""
        noise_NA: Tensor | float = MEDIAN_NOISE
        if self.training:
            uniform = torch.rand(number_NA.shape, generator=self.generator).clamp(1e-6, 1 - 1e-6)
            noise_NA = -(-uniform.log()).log().to(number_NA)
        soft_NA = ((number_NA + self.plan.offset + noise_NA) / self.plan.temperature).sigmoid()
        return soft_NA[:, : self.L], soft_NA[:, self.L :].unflatten(1, (self.L, self.F))

    def masks(self) -> tuple[Tensor, Tensor]:
        """Of the N codes, hard bits of layers [N, L] and of units [N, L, F], with the gradients of soft ones.

        Where all bits are 0, the largest is 1: a subnet has a layer, and a layer has a unit.
        """
        depth_NL, width_NLF = self.bits(self.codes * CODE_GAIN)
        return _rounded(depth_NL), _rounded(width_NLF)

    def share(self, depth_NL: Tensor, width_NLF: Tensor) -> Tensor:
        """[N]: the share of operations that each code keeps."""
        own = self.attention_share
        return (depth_NL * (own + (1 - own) * width_NLF.mean(dim=-1))).mean(dim=-1)

    def own_code(self, embedding_BD: Tensor) -> Tensor:
        """[B, A]: the direction of each prompt's own code."""
        return direction(*self.bits(self.predicted(embedding_BD)))

    @torch.no_grad()
    def route(self, prompt_BS: Tensor) -> Tensor:
        """int64 [B]: the code of each prompt; without noise or transport, so a prompt's code is its own affair."""
        was_training = self.training
        self.eval()
        code_B = (self.own_code(self.embed(prompt_BS)) @ direction(*self.masks()).T).argmax(dim=-1)
        self.train(was_training)
        return code_B

    def masked_weights(self, depth_L: Tensor, width_LF: Tensor) -> dict[str, Tensor]:
        """The model's weights that a code changes: what a layer or a unit that is left out would write is 0."""
        changed = {}
        for number, layer in enumerate(self._model[0].model.layers):
            prefix = f"model.layers.{number}."
            changed[prefix + "self_attn.o_proj.weight"] = layer.self_attn.o_proj.weight * depth_L[number]
            changed[prefix + DOWN] = layer.mlp.experts.down_proj * (depth_L[number] * width_LF[number])
        return changed

    def loss(self, token_BS: Tensor, prompt: int) -> Tensor:
        """The loss of a batch of sequences whose first tokens are prompts.

        Args:
            token_BS: int64, whole sequences.
            prompt: how many of their tokens the router reads.
        """
        plan, embedding_BD = self.plan, self.embed(token_BS[:, :prompt])
        depth_NL, width_NLF = self.masks()
        own_BA = self.own_code(embedding_BD)
        likeness_BN = own_BA @ direction(depth_NL, width_NLF).T.detach()
        given_BN = transported(likeness_BN.detach(), plan)
        code_B = given_BN.argmax(dim=-1)
        with torch.no_grad():
            teacher = self._model[0](token_BS, use_cache=False).logits[:, :-1]
        following = torch.zeros((), device=token_BS.device)
        for code in code_B.unique().tolist():
            row = (code_B == code).nonzero()[:, 0]
            weights = self.masked_weights(depth_NL[code], width_NLF[code])
            logits = functional_call(self._model[0], weights, (token_BS[row],), {"use_cache": False}).logits[:, :-1]
            following = following + len(row) * self._prediction_loss(logits, teacher[row], token_BS[row, 1:])
        share = self.share(depth_NL, width_NLF)[code_B].mean()
        budget = (share / plan.budget).log().abs()
        prompt_BD = normalize(embedding_BD, dim=-1)
        contrast = _cross_entropy(
            (prompt_BD @ prompt_BD.T / plan.prompt_temperature).softmax(dim=-1),
            own_BA @ own_BA.T / plan.code_temperature,
        )
        agreement = _cross_entropy(given_BN, likeness_BN / plan.code_temperature)
        return (
            following / len(token_BS)
            + plan.budget_weight * budget
            + plan.contrast_weight * contrast
            + plan.agreement_weight * agreement
        )

    def subnet(self, code: int) -> Subnet:
        """What a code keeps, without noise."""
        was_training = self.training
        self.eval()
        with torch.no_grad():
            depth_NL, width_NLF = self.masks()
        self.train(was_training)
        layers = depth_NL[code].nonzero()[:, 0].tolist()
        return Subnet(tuple(layers), tuple(width_NLF[code, layer].nonzero()[:, 0] for layer in layers))

    def _prediction_loss(self, logits: Tensor, teacher: Tensor, label: Tensor) -> Tensor:
        log_p = log_softmax(logits.flatten(0, 1).float(), dim=-1)
        log_q = log_softmax(teacher.flatten(0, 1).float(), dim=-1)
        distilled = kl_div(log_p, log_q, reduction="batchmean", log_target=True)
        return cross_entropy(logits.flatten(0, 1).float(), label.flatten()) + self.plan.distillation_weight * distilled


def direction(depth_NL: Tensor, width_NLF: Tensor) -> Tensor:
    """[N, A], of length 1: bits of units count where their layer is there, and all units of a layer as much as it."""
    width_NLF = width_NLF * depth_NL[..., None] * width_NLF.shape[-1] ** -0.5
    return normalize(torch.cat([depth_NL, width_NLF.flatten(1)], dim=-1), dim=-1)


def transported(likeness_BN: Tensor, plan: PromptPlan) -> Tensor:
    """[B, N]: shares of each prompt, rows sum to 1; the more rounds, the nearer columns come to B / N each.

    Without transport each prompt has its nearest code alone.
    """
    if not plan.transports:
        return torch.zeros_like(likeness_BN).scatter(1, likeness_BN.argmax(dim=-1, keepdim=True), 1.0)
    share_BN = ((likeness_BN - likeness_BN.max()) / plan.transport_scale).exp()
    for _ in range(plan.transport_rounds):
        share_BN = share_BN / share_BN.sum(dim=0, keepdim=True)
        share_BN = share_BN / share_BN.sum(dim=1, keepdim=True)
    return share_BN


def _cross_entropy(wanted: Tensor, score: Tensor) -> Tensor:
    """Mean over rows, of distributions against softmaxes of scores."""
    return -(wanted * score.log_softmax(dim=-1)).sum(dim=-1).mean()


def _rounded(soft: Tensor) -> Tensor:
    hard = (soft >= 0.5).to(soft)
    largest = torch.zeros_like(soft).scatter(-1, soft.argmax(dim=-1, keepdim=True), 1.0)
    hard = torch.maximum(hard, largest)
    return soft + (hard - soft).detach()
