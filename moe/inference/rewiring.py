"""Rewiring at test time: offsets on router logits, fitted to the context of one request while it is generated.

Shapes: L MoE layers, R routable experts, K experts per token, T tokens, S positions.
"""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from .logit_offsets import Offsets, logit_offsets

SELECTIONS = ("all", "hard", "soft")
READINGS = ("flat", "sharp")


@dataclass(frozen=True, kw_only=True)
class Rewiring:
    """How offsets are fitted.

    Args:
        steps: gradient steps before each stretch of generation.
        rate: their size (Adam; the paper does not name the optimiser).
        every: tokens generated between two fits.
        selection: which layers are fitted: `all`, `hard` (the best `share` of them), `soft` (all, each by its
            confidence relative to the largest).
        share: for `hard`, the share of layers that change, in (0, 1].
        reading: what counts as confident. The published formula, the mean of -log p over selected experts, is larger
            for flatter routing, its text says the opposite: `flat` follows the formula, `sharp` the text.

    Raises:
        ValueError: if a value is out of range.

    Source: Su et al. 2025, arXiv:2510.14853.
    """

    steps: int = 5
    rate: float = 0.05
    every: int = 128
    selection: str = "all"
    share: float = 0.5
    reading: str = "flat"

    def __post_init__(self) -> None:
        if self.steps < 0 or self.every < 1:
            raise ValueError(f"steps must be at least 0 and every at least 1; got {self.steps} and {self.every}")
        if self.selection not in SELECTIONS:
            raise ValueError(f"selection must be one of {', '.join(SELECTIONS)}; got {self.selection!r}")
        if self.reading not in READINGS:
            raise ValueError(f"reading must be one of {', '.join(READINGS)}; got {self.reading!r}")
        if not 0 < self.share <= 1:
            raise ValueError(f"share must lie in (0, 1]; got {self.share:g}")


def generate_rewired(
    model: Any, token_1S: Tensor, settings: Rewiring, *, max_new_tokens: int, **options: Any
) -> tuple[Tensor, dict[str, Any]]:
    """Generate for one request; offsets start at zero and are gone afterwards.

    Before each stretch, the offsets are fitted on the cross entropy of the whole context so far, whose keys and values
    are then recomputed with them.

    Args:
        model: a resident model, ours or transformers', or an offloaded one that passes gradients.
        token_1S: int64 [1, S], the prompt, at least 2 tokens.
        settings: steps and learning rate of the fit, and how often it is repeated.
        max_new_tokens: in all stretches together.
        **options: of `generate`.

    Returns:
        [1, S + generated], and the cost: seconds of fitting and of generating, tokens passed forward and backward,
        context losses before and after each fit, and the largest offset.

    Raises:
        ValueError: if the model is offloaded, there is more than one request, or offsets have no gradient.
    """
    if hasattr(model, "offload") and not model.offload.passes_gradients:
        raise ValueError("experts that are offloaded pass no gradients; rewire it by `generate --rewire`")
    _expect_one(token_1S)
    report: dict[str, Any] = {"fit_s": 0.0, "generate_s": 0.0, "fitted_tokens": 0, "loss_before": [], "loss_after": []}
    end = token_1S.shape[1] + max_new_tokens
    with logit_offsets(model) as offsets:
        optimizer = torch.optim.Adam([offsets.delta_LR], lr=settings.rate)
        while token_1S.shape[1] < end:
            started = time.perf_counter()
            if settings.steps:
                _fit(model, token_1S, offsets, optimizer, settings, report)
            fitted = time.perf_counter()
            stretch = min(settings.every, end - token_1S.shape[1])
            before = token_1S.shape[1]
            token_1S = model.generate(token_1S, max_new_tokens=stretch, **options)
            report["fit_s"] += fitted - started
            report["generate_s"] += time.perf_counter() - fitted
            if token_1S.shape[1] - before < stretch or _has_ended(model, token_1S):
                break
        report["largest_offset"] = float(offsets.delta_LR.abs().max())
    return token_1S, report


@contextmanager
def rewired(model: Any, token_1S: Tensor, settings: Rewiring) -> Iterator[dict[str, Any]]:
    """Inside, the model runs with offsets that were fitted once to a context.

    Args:
        model: a resident model, ours or transformers'.
        token_1S: int64 [1, S], the context, at least 2 tokens.
        settings: how they are fitted; `every` says nothing here.

    Yields:
        Tokens that were passed, and the context's loss before and after the fit.

    Raises:
        ValueError: if there is more than one request, or offsets have no gradient.
    """
    _expect_one(token_1S)
    report: dict[str, Any] = {"fitted_tokens": 0, "loss_before": [], "loss_after": []}
    with logit_offsets(model) as offsets:
        if settings.steps:
            optimizer = torch.optim.Adam([offsets.delta_LR], lr=settings.rate)
            _fit(model, token_1S, offsets, optimizer, settings, report)
        yield report


def confidence_L(logits: list[Tensor], top_k: int, reading: str) -> Tensor:
    """Per layer, the mean over tokens and selected experts of -log p, or its negative; larger is more confident."""
    flat = torch.stack(
        [-logit_TR.detach().log_softmax(dim=-1).topk(top_k, dim=-1).values.mean() for logit_TR in logits]
    )
    return flat if reading == "flat" else -flat


def layer_weights(confidence: Tensor, settings: Rewiring) -> Tensor:
    """[L] factors of each layer's gradient."""
    if settings.selection == "all":
        return torch.ones_like(confidence)
    if settings.selection == "soft":
        return (confidence - confidence.max()).exp()
    num_fitted = max(1, round(settings.share * len(confidence)))
    return torch.zeros_like(confidence).scatter(0, confidence.topk(num_fitted).indices, 1.0)


def _expect_one(token_1S: Tensor) -> None:
    if token_1S.shape[0] != 1 or token_1S.shape[1] < 2:
        raise ValueError(f"offsets belong to one request of at least 2 tokens; got {list(token_1S.shape)}")


def _fit(
    model: Any,
    token_1S: Tensor,
    offsets: Offsets,
    optimizer: torch.optim.Optimizer,
    settings: Rewiring,
    report: dict[str, Any],
) -> None:
    delta_LR = offsets.delta_LR.requires_grad_()
    weight_L1 = None
    with torch.enable_grad():
        for step in range(settings.steps):
            loss = _context_loss(model, token_1S)
            (gradient_LR,) = torch.autograd.grad(loss, [delta_LR], allow_unused=True)
            if gradient_LR is None or not gradient_LR.any() or _are_constant(offsets.weights.values()):
                raise ValueError(
                    "the loss has no gradient with respect to router logits: the experts' weights do not depend on "
                    "them (top-1 with renormalised weights is always 1); rewiring cannot change anything here"
                )
            if weight_L1 is None:
                logits = [offsets.logits[layer] for layer in sorted(offsets.logits)]
                top_k = min(model.config.num_experts_per_tok, delta_LR.shape[1])
                weight_L1 = layer_weights(confidence_L(logits, top_k, settings.reading), settings)[:, None]
            if step == 0:
                report["loss_before"].append(loss.item())
            delta_LR.grad = gradient_LR
            _step_scaled(optimizer, delta_LR, weight_L1)
            report["fitted_tokens"] += token_1S.shape[1]
    delta_LR.requires_grad_(False)
    delta_LR.grad = None
    with torch.no_grad():
        report["loss_after"].append(_context_loss(model, token_1S).item())


@torch.no_grad()
def _step_scaled(optimizer: torch.optim.Optimizer, delta_LR: Tensor, weight_L1: Tensor) -> None:
    """One step whose update, not whose gradient, is scaled per layer: Adam would undo a scaled gradient."""
    before_LR = delta_LR.clone()
    optimizer.step()
    delta_LR.copy_(before_LR + weight_L1 * (delta_LR - before_LR))


def _context_loss(model: Any, token_1S: Tensor) -> Tensor:
    logits = model(token_1S, use_cache=False).logits
    return cross_entropy(logits[0, :-1].float(), token_1S[0, 1:])


def _are_constant(weights: Iterable[Tensor]) -> bool:
    """Whether no weight differs from another by more than rounding; then its gradient is rounding as well."""
    return all(bool(weight_TK.max() - weight_TK.min() <= 1e-6 * weight_TK.max()) for weight_TK in weights)


def _has_ended(model: Any, token_1S: Tensor) -> bool:
    ends = model.generation_config.eos_token_id
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    return int(token_1S[0, -1]) in ends
