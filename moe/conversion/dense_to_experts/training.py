"""Rounds of training after slicing: the router learns which experts' channels a token uses, then experts are tuned.

Shapes: B sequences, S positions, T = B * S tokens, L layers, F hidden channels, E experts.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...architectures.read_me.token_router import context_of
from ...model.decoder import MoEForCausalLM
from ..flags import flag
from ..layer_by_layer import mean_loss
from .domain_masks import LayerSlices, hidden_channels


@dataclass(frozen=True, kw_only=True)
class Rounds:
    """How long and how fast.

    Args:
        rounds: each is router steps, then expert steps; the learning rates shrink by `shrink` from one to the next.
        router_steps, expert_steps: per round.
        batch_size: sequences per step.
        router_rate, expert_rate: learning rates at the start of a round, positive; a cosine takes them to 0 within it.
        shrink: in (0, 1]; 0.8 leaves a fifth of the rates after eight rounds.
        sharpness: the targets are the softmax of `sharpness * overlap`; larger is nearer to the best expert alone.
        seed: of clusters, the router's start and the order of the sequences.

    Raises:
        ValueError: if a learning rate is not positive.
    """

    rounds: int = flag("Rounds of router and expert steps.", default=8, min=0)
    router_steps: int = flag("Router steps per round.", default=100, min=0)
    expert_steps: int = flag("Expert steps per round.", default=200, min=0)
    batch_size: int = flag("Sequences per step.", default=8, min=1)
    router_rate: float = flag("Learning rate of the router.", default=5e-4)
    expert_rate: float = flag("Learning rate of the experts.", default=5e-5)
    shrink: float = 0.8
    sharpness: float = 10.0
    seed: int = flag("Of clusters, the router's start and the order of batches.", default=0)

    def __post_init__(self) -> None:
        for name in ("router_rate", "expert_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a positive number; got {getattr(self, name)}")


def overlap_target_LTE(hidden: Sequence[Tensor], slices: Sequence[LayerSlices], sharpness: float) -> Tensor:
    """Per layer and token, the softmax of how much of the token's own stronger half of channels each mask keeps.

    Overlaps are shares of the token's own mask (the permanent channels add the same to each expert and cancel).

    Args:
        hidden: per layer, what enters the dense down projection, [..., F].
        slices: per layer.
        sharpness: factor before the softmax.

    Source: Cai et al. 2024 (Read-ME), arXiv:2410.19123, section 3.2; absolute activations, as for the masks.
    """
    targets = []
    for h, cut in zip(hidden, slices, strict=True):
        h_TF = h.flatten(0, -2).abs()
        half = max(1, h_TF.shape[-1] // 2)
        own_TF = torch.zeros_like(h_TF, dtype=torch.float32).scatter(1, h_TF.topk(half, dim=-1).indices, 1.0)
        overlap_TE = own_TF @ cut.is_kept_EF.to(own_TF).T / half
        targets.append((sharpness * overlap_TE).softmax(dim=-1))
    return torch.stack(targets)


def distillation_loss(logit_TE: Tensor, target_LTE: Tensor) -> Tensor:
    """KL(softmax(G) || target), mean over layers and tokens: one prediction against every layer's target."""
    log_TE = logit_TE.log_softmax(dim=-1)
    difference_LTE = log_TE - target_LTE.clamp_min(torch.finfo(torch.float32).tiny).log()
    return (log_TE.exp() * difference_LTE).sum(dim=-1).mean()


def train_rounds(
    model: MoEForCausalLM,
    dense: Any,
    slices: Sequence[LayerSlices],
    token_BS: Tensor,
    held_out_BS: Tensor,
    settings: Rounds,
    advance: Callable[[], None] = lambda: None,
) -> list[dict[str, float]]:
    """Router distillation and expert tuning in turn; each leaves the other's parameters as they are.

    Returns:
        Per round: mean distillation loss, share of tokens and layers whose target's best expert the router names, and
        the held-out loss after the router's and after the experts' steps.
    """
    batches = _batches(token_BS, settings)
    core = model.model.moe_layers[0].router.core
    feed_forwards = [layer.mlp for layer in model.model.layers]
    history = []
    for number in range(settings.rounds):
        shrink = settings.shrink**number

        def distil(token_BS: Tensor) -> tuple[Tensor, float]:
            with torch.no_grad(), hidden_channels(dense) as hidden:
                dense.model(token_BS, use_cache=False)
                target_LTE = overlap_target_LTE(hidden, slices, settings.sharpness)
            logit_TE = core(context_of(token_BS))
            agrees = (logit_TE.argmax(-1) == target_LTE.argmax(-1)).float().mean()
            return distillation_loss(logit_TE, target_LTE), float(agrees)

        def tune(token_BS: Tensor) -> tuple[Tensor, float]:
            return model(token_BS, labels=token_BS, use_cache=False).lm_loss, 0.0

        distilled = _phase(distil, [core], batches, settings.router_steps, settings.router_rate * shrink, advance)
        after_router = mean_loss(model, held_out_BS)
        experts = [part for mlp in feed_forwards for part in (mlp.experts, mlp.permanent) if part is not None]
        _phase(tune, experts, batches, settings.expert_steps, settings.expert_rate * shrink, advance)
        history.append(
            {
                "distillation_loss": distilled[0],
                "router_agreement": distilled[1],
                "loss_after_router": after_router,
                "loss_after_experts": mean_loss(model, held_out_BS),
            }
        )
    return history


def _phase(
    compute: Callable[[Tensor], tuple[Tensor, float]],
    parts: Sequence[nn.Module],
    batches: Iterator[Tensor],
    steps: int,
    rate: float,
    advance: Callable[[], None],
) -> tuple[float, float]:
    """Optimise `parts` and nothing else; gives the mean loss and second result of the steps' last half."""
    parameters = [parameter for part in parts for parameter in part.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01)
    results = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
        loss, other = compute(next(batches))
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"diverged at step {step + 1}: loss {loss.item()}; lower the learning rate")
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        results.append((loss.item(), other))
        advance()
    for parameter in parameters:
        parameter.grad = None
    last = results[len(results) // 2 :]
    return (
        sum(loss for loss, _ in last) / max(len(last), 1),
        sum(other for _, other in last) / max(len(last), 1),
    )


def _batches(token_BS: Tensor, settings: Rounds) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(settings.seed)
    while True:
        yield token_BS[torch.randint(len(token_BS), (settings.batch_size,), generator=generator)]
