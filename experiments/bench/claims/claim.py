"""Claim: one question to a paper, and what answers it; fit: the training loop that all of them share."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Parameter

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One paper's claim, tried at toy size.

    Args:
        question: what the rows answer.
        source: paper, with its arXiv number.
        run: rows of one seed after so many optimiser steps; each names its `variant`, the other values are numbers, or
            None where a variant has no such number.
        steps: optimiser steps by default, of the largest run of a variant.
    """

    question: str
    source: str
    run: Callable[[int, int], list[Row]]
    steps: int


def fit(
    parameters: "Iterable[Parameter]",
    loss_of: "Callable[[int], Tensor]",
    steps: int,
    rate: float,
    after_step: Callable[[], None] = lambda: None,
) -> None:
    """AdamW under a cosine to a tenth of the rate, after a rise over the first tenth of the steps.

    Args:
        parameters: what is trained.
        loss_of: the loss of a step, by its number.
        steps: optimiser steps.
        rate: the largest learning rate.
        after_step: called when the optimiser has stepped; routers that steer by counts are told then.

    Raises:
        FloatingPointError: if a loss is not finite.
    """
    import torch

    trained = list(parameters)
    optimizer = torch.optim.AdamW(trained, lr=rate, betas=(0.9, 0.95), weight_decay=0.01)
    rise = max(1, steps // 10)
    for step in range(steps):
        fall = (1 + math.cos(math.pi * max(0, step - rise) / max(1, steps - rise))) / 2
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / rise) * (0.1 + 0.9 * fall)
        loss = loss_of(step)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss of step {step + 1} is {loss.item()}; lower the learning rate")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        after_step()


def small_decoder(**settings: Any) -> dict[str, Any]:
    """Settings of a `MoEConfig` of two layers of width 48, which trains a hundred steps in seconds."""
    sizes = {
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
    }
    return sizes | settings
