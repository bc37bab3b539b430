"""The loss of a micro-batch: the mean over the tokens of a whole step that are to be learnt."""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from ..examples import NO_LOSS
from ..storage.activations import SpilledActivations
from .experts import TunedExperts


def learnt_tokens(labels: list[torch.Tensor]) -> int:
    """Tokens of a step that are predicted and to be learnt."""
    return sum(int((label_BS[:, 1:] != NO_LOSS).sum()) for label_BS in labels)


def share_of_loss(model: Any, token_BS: torch.Tensor, label_BS: torch.Tensor, num_learnt: int) -> torch.Tensor:
    """What a micro-batch adds to a step's loss, in nats per learnt token.

    Args:
        model: of transformers.
        token_BS, label_BS: ids, and labels that are NO_LOSS where nothing is learnt.
        num_learnt: tokens of the whole step that are learnt.
    """
    logits_BSV = model(input_ids=token_BS, use_cache=False).logits
    if not torch.is_grad_enabled():
        return _sum_of_losses(logits_BSV, label_BS) / num_learnt
    # computed once more in the backward pass: autograd would keep two copies of all logits in float32
    options = {"use_reentrant": False, "preserve_rng_state": False}
    total: torch.Tensor = checkpoint(_sum_of_losses, logits_BSV, label_BS, **options)
    return total / num_learnt


def _sum_of_losses(logits_BSV: torch.Tensor, label_BS: torch.Tensor) -> torch.Tensor:
    wide = torch.promote_types(logits_BSV.dtype, torch.float32)
    flat = logits_BSV[:, :-1].to(wide).flatten(0, 1)
    return cross_entropy(flat, label_BS[:, 1:].flatten(), ignore_index=NO_LOSS, reduction="sum")


def relative_error(found: Sequence[torch.Tensor], exact: Sequence[torch.Tensor]) -> float:
    """The root of the sum of squared differences, over that of `exact`, of all tensors together."""
    pairs = [(a.double(), b.double()) for a, b in zip(found, exact, strict=True)]
    square, of = sum((a - b).square().sum().item() for a, b in pairs), sum(b.square().sum().item() for _, b in pairs)
    return float((square / of) ** 0.5) if of else 0.0


def backward_passes(
    model: Any,
    experts: TunedExperts,
    batches: Sequence[tuple[torch.Tensor, torch.Tensor]],
    spilled: SpilledActivations | None = None,
) -> float:
    """All micro-batches of a step side by side in both directions; the step's loss.

    Args:
        model: of transformers, with or without adapters.
        experts: those that the model calls, where all passes meet.
        batches: ids and labels of each micro-batch.
        spilled: takes what autograd keeps; None leaves all of it in memory.
    """
    num_learnt = learnt_tokens([labels for _, labels in batches])
    passes = [
        partial(_backward_pass, model, ids, labels, num_learnt, spilled, number)
        for number, (ids, labels) in enumerate(batches)
    ]
    with nullcontext() if spilled is None else spilled.step(experts.visits):
        return float(sum(experts.lockstep.run(passes, experts.answer)))


def _backward_pass(
    model: Any,
    token_BS: torch.Tensor,
    label_BS: torch.Tensor,
    num_learnt: int,
    spilled: SpilledActivations | None,
    number: int,
) -> float:
    """One micro-batch in both directions; what it adds to the step's loss."""
    with torch.enable_grad(), nullcontext() if spilled is None else spilled.of_pass(number):
        loss = share_of_loss(model, token_BS, label_BS, num_learnt)
        loss.backward()
    return loss.item()
