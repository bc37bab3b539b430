"""Objectives: exact functions of a plan and data, lower is better, independent of any solver.

Every objective gives one value per layer and scenario; `evaluate` joins them: over scenarios by a robustness rule (per
layer), then the mean over layers.
"""

from .expression import find_objective, weighted, with_churn, without_churn
from .objective import (
    Objective,
    PartWeights,
    Term,
    evaluate,
    evaluate_L,
    flat_terms,
    join_scenarios,
    sum_of,
)
from .registry import OBJECTIVES

__all__ = [
    "OBJECTIVES",
    "Objective",
    "PartWeights",
    "Term",
    "evaluate",
    "evaluate_L",
    "find_objective",
    "flat_terms",
    "join_scenarios",
    "sum_of",
    "weighted",
    "with_churn",
    "without_churn",
]
