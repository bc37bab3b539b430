"""Objectives: exact functions of a plan and data, lower is better, independent of any solver.

Every objective gives one value per layer and scenario; `evaluate` joins them: over scenarios by a robustness rule (per
layer), then the mean over layers.
"""

from .registry import (
    OBJECTIVES,
    Objective,
    PartWeights,
    Robustness,
    evaluate,
    evaluate_L,
    find_objective,
    join_scenarios,
    part_weights,
    weighted,
    with_churn,
    without_churn,
)

__all__ = [
    "OBJECTIVES",
    "Objective",
    "PartWeights",
    "Robustness",
    "evaluate",
    "evaluate_L",
    "find_objective",
    "join_scenarios",
    "part_weights",
    "weighted",
    "with_churn",
    "without_churn",
]
