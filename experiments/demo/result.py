"""What a run of the demo found, stage by stage; the report shows exactly this.

Shapes: L MoE layers, G GPUs.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from placement import Cluster, Plan, Score
from routing import RoutingTrace

from ..train.description.config import TrainConfig
from ..train.loop import TrainResult


@dataclass(frozen=True, kw_only=True)
class Yardsticks:
    """Bits per byte on the same held-out text of models that only count."""

    bigram: float
    trigram: float


@dataclass(frozen=True, kw_only=True)
class OffloadedRun:
    """A generation with a quarter of the experts in memory, against the fully resident one.

    Args:
        cache_experts: RAM slots per layer.
        same_tokens, same_logits: whether every token and every logit bit agreed.
        prompt, generated: the text that was continued, and its continuation.
        report: `model.offload.report()`.
        tokens_per_second: of the offloaded decode.
    """

    cache_experts: int
    same_tokens: bool
    same_logits: bool
    prompt: str
    generated: str
    report: dict[str, Any]
    tokens_per_second: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Placements:
    """The contiguous layout and the solved one, scored on the held-out half of the trace.

    Args:
        cluster: where the experts are placed.
        load_LG: tokens per layer and GPU of each plan, by name.
        scores: by name.
        plan: the solved plan with its certificate.
    """

    cluster: Cluster
    load_LG: dict[str, NDArray[np.float64]]
    scores: dict[str, Score]
    plan: Plan


@dataclass(frozen=True, kw_only=True, eq=False)
class DemoResult:
    """All that the report shows."""

    config: TrainConfig
    trained: TrainResult
    log: list[dict[str, Any]]
    yardsticks: Yardsticks
    offloaded: OffloadedRun
    trace: RoutingTrace
    hit_rates: dict[str, list[float]]
    placements: Placements
    seconds: dict[str, float]
