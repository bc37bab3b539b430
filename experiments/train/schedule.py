"""Learning-rate schedules, as functions of the step."""

import math
from collections.abc import Callable

from .description.config import TrainConfig


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate of optimiser step `step` (0 is the first): a linear rise to the peak, then the schedule."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    height = SCHEDULES[config.schedule](config, step)
    return config.min_learning_rate + (config.learning_rate - config.min_learning_rate) * max(0.0, height)


def _progress(config: TrainConfig, step: int) -> float:
    """Share of the steps after the warm-up that are done, 0..1."""
    return min(1.0, (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps))


def _cosine(config: TrainConfig, step: int) -> float:
    """Source: Loshchilov and Hutter 2017, arXiv:1608.03983, eq. 5."""
    return (1 + math.cos(math.pi * _progress(config, step))) / 2


def _wsd(config: TrainConfig, step: int) -> float:
    """Warm-up, stable, decay. Source: Hu et al. 2024 (MiniCPM), arXiv:2404.06395, section 4."""
    return min(1.0, (config.steps - step) / max(1, round(config.decay_share * config.steps)))


def _linear(config: TrainConfig, step: int) -> float:
    return 1 - _progress(config, step)


def _constant(config: TrainConfig, step: int) -> float:
    return 1.0


SCHEDULES: dict[str, Callable[[TrainConfig, int], float]] = {
    "cosine": _cosine,
    "wsd": _wsd,
    "linear": _linear,
    "constant": _constant,
}
"""Height between the last and the peak rate, 0..1, by name."""
