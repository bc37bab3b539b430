"""What the checker of plans on GPUs knows of batches: the worst tenth of them, cut from the traffic again.

Shapes: T tokens, K experts per token, E experts.
"""

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ..contract.plan import Plan
from ..contract.problem import Scenario
from .bounds import least_imbalance
from .figures import NotDerivedError
from .metrics import imbalance
from .shares import shares_EG

Float = NDArray[np.float64]
# as docs/placement.md gives them: batches looked at, least batches of a trace, and the share of the worst ones
MOST, LEAST, TAIL = 64, 8, 0.1


def tails(plan: Plan, scenario: Scenario) -> list[float]:
    """Mean imbalance over the worst tenth of the batches of `ep.batch_tokens` consecutive tokens, in each layer."""
    found = []
    for layer in range(plan.num_layers):
        table = None if plan.dispatch == "quota" else shares_EG(plan, layer)
        found.append(_worst_tenth([imbalance(plan, layer, load_E, table) for load_E in _loads(plan, scenario, layer)]))
    return found


def least_tails(plan: Plan, scenario: Scenario) -> list[float]:
    """The same of each batch's own bound."""
    return [
        _worst_tenth([least_imbalance(plan, load_E) for load_E in _loads(plan, scenario, layer)])
        for layer in range(plan.num_layers)
    ]


def _loads(plan: Plan, scenario: Scenario, layer: int) -> Iterator[Float]:
    trace = scenario.trace
    if trace is None:
        raise NotDerivedError(f"{scenario.name} has loads only, and batches need tokens: give the trace")
    size = max(1, min(plan.cluster.ep.batch_tokens, trace.num_tokens // LEAST))
    count = trace.num_tokens // size
    chosen = [round(float(at)) for at in np.linspace(0, count - 1, MOST)] if count > MOST else range(count)
    for number in chosen:
        choice_TK = trace.expert_TLK[number * size : (number + 1) * size, layer]
        yield np.bincount(choice_TK[choice_TK >= 0], minlength=plan.num_experts).astype(np.float64)


def _worst_tenth(values: list[float]) -> float:
    worst = sorted(values)[-max(1, round(TAIL * len(values))) :]
    return math.fsum(worst) / len(worst)
