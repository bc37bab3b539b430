"""Claim: one question to a paper, what answers it, and the verdict; fit: the training loop that all of them share."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

from ...judging.equivalence import mean_interval

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Parameter

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What a paper makes one expect: of two variants one is better by some measure.

    Args:
        variant, against: names of rows.
        measure: a column.
        better: which direction is better.
        by: the least gain that counts, in units of the measure; negative where so much loss is still as claimed.
    """

    variant: str
    against: str
    measure: str
    better: Literal["lower", "higher"] = "lower"
    by: float = 0.0

    def judge(self, rows: Sequence[Row]) -> "Verdict":
        """The gain over the seeds of both variants, which are paired: a seed draws the same data for all."""
        sign = -1.0 if self.better == "lower" else 1.0
        values = [
            {row["seed"]: row[self.measure] for row in rows if row["variant"] == name}
            for name in (self.variant, self.against)
        ]
        gains = [sign * (values[0][seed] - values[1][seed]) for seed in sorted(values[0].keys() & values[1].keys())]
        interval = mean_interval(gains)
        return Verdict(expected=self, gain=fmean(gains), interval=interval, answer=self._answer(interval))

    def _answer(self, interval: tuple[float, float] | None) -> str:
        if interval is None:
            return "one seed: no verdict"
        low, high = interval
        return "as claimed" if low > self.by else "not as claimed" if high < self.by else "open"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the rows say of an expectation.

    Args:
        expected: what was expected.
        gain: mean over seeds; above 0 is better.
        interval: of the gain, 95 %; None with one seed.
        answer: `as claimed` or `not as claimed` where the interval excludes the other, `open` where it does not.
    """

    expected: Expected
    gain: float
    interval: tuple[float, float] | None
    answer: str


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One paper's claim, tried at toy size.

    Args:
        question: what the rows answer.
        source: paper, with its arXiv number.
        run: rows of one seed after so many optimiser steps; each names its `variant`, the other values are numbers, or
            None where a variant has no such number.
        steps: optimiser steps by default, of the largest run of a variant.
        expected: what the paper makes one expect of the rows; empty where variants are not ranked.
    """

    question: str
    source: str
    run: Callable[[int, int], list[Row]]
    steps: int
    expected: tuple[Expected, ...] = ()


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
