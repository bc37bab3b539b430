"""Learning-rate schedules, as functions of the step."""

import math

from .presets import TrainConfig


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate of optimiser step `step` (0 is the first).

    Source: cosine, Loshchilov and Hutter 2017, arXiv:1608.03983, eq. 5; warm-up, stable, decay: Hu et al. 2024
    (MiniCPM), arXiv:2404.06395, section 4.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "cosine":
        progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
        height = (1 + math.cos(math.pi * min(1.0, progress))) / 2
    else:
        decay_steps = max(1, round(config.decay_share * config.steps))
        height = min(1.0, (config.steps - step) / decay_steps)
    return config.min_learning_rate + (config.learning_rate - config.min_learning_rate) * max(0.0, height)
