"""Learning rates and batches that published laws give for a run; both were fitted far above the sizes trained here.

In their formulas N is parameters without embeddings, C training compute in FLOPs.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What a law advises.

    Args:
        learning_rate: peak of the schedule.
        batch_tokens: tokens per optimiser step.
    """

    learning_rate: float
    batch_tokens: float


@dataclass(frozen=True, kw_only=True)
class RunSize:
    """What the laws look at.

    Args:
        parameters: all of the model's but embedding and head.
        tokens: of the whole run.
        flops_per_token: of a forward pass, without embedding and head.
    """

    parameters: float
    tokens: float
    flops_per_token: float

    def __post_init__(self) -> None:
        for name in ("parameters", "tokens", "flops_per_token"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a positive number; got {value}")

    @property
    def compute(self) -> float:
        """C as Ling counts it: forward FLOPs per token, times tokens."""
        return self.flops_per_token * self.tokens


def step_law(size: RunSize) -> Rates:
    """Rate from parameters and tokens, batch from tokens, for dense models and mixtures.

    Source: Li et al. 2025 (Step Law), arXiv:2503.04715, eq. 1: rate 1.79 N^-0.713 D^0.307, batch 0.58 D^0.571, with D
    the tokens of the run.
    """
    return Rates(
        learning_rate=1.79 * size.parameters**-0.713 * size.tokens**0.307, batch_tokens=0.58 * size.tokens**0.571
    )


def ling_law(size: RunSize) -> Rates:
    """Rate and batch from compute, for mixtures of experts.

    Source: Tian et al. 2025 (Ling, "Towards Greater Leverage"), arXiv:2507.17702, section 3: rate 1.1576 C^-0.1529,
    batch 0.0694 C^0.3644 tokens.
    """
    return Rates(learning_rate=1.1576 * size.compute**-0.1529, batch_tokens=0.0694 * size.compute**0.3644)


RATE_LAWS: dict[str, Callable[[RunSize], Rates]] = {"step_law": step_law, "ling": ling_law}
