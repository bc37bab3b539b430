"""Figures of a plan: what its file claims, what was derived, and whether both agree.

Shapes: W scenarios, L layers, E experts.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..contract.plan import Plan

Float = NDArray[np.float64]

# relative: sums of float64 in another order differ by less; absolute, beside numbers that are 0 but for rounding
TOLERANCE, NOTHING = 1e-6, 1e-12
LOAD_TOLERANCE = 1e-9  # plans keep loads to 12 digits
HOLDS, FAILS, PARTLY, OPEN = "holds", "does not hold", "holds in part", "not derived"


class NotDerivedError(Exception):
    """A figure that the data do not settle, or that the checker does not know; the message says which and why."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One figure.

    Args:
        name: what it is, such as `gpu_fanout`.
        claimed: what the file says; None if it says nothing.
        derived: what the checker found; None if that is no number, or nothing.
        faults: a sentence for each thing that is wrong.
        open: why it was not derived, or not all of it; empty where it was.
    """

    name: str
    claimed: float | None = None
    derived: float | None = None
    faults: tuple[str, ...] = ()
    open: str = ""

    @property
    def verdict(self) -> str:
        """Whether the figure holds, does not, rests on a solver in part, or was not derived."""
        unsettled = OPEN if self.derived is None else PARTLY
        return FAILS if self.faults else unsettled if self.open else HOLDS

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "faults": list(self.faults), "verdict": self.verdict}


def compared(name: str, claimed: Any, derived: float, *, tolerance: float = TOLERANCE) -> Figure:
    """The figure of a claim that must equal what was derived; what is no number does not."""
    is_number = isinstance(claimed, int | float)
    if is_number and math.isclose(derived, claimed, rel_tol=tolerance, abs_tol=NOTHING):
        return Figure(name=name, claimed=claimed, derived=derived)
    wrong = f"{name} is {derived}, the certificate claims {claimed}"
    return Figure(name=name, claimed=claimed if is_number else None, derived=derived, faults=(wrong,))


def is_above(claimed: float, proved: float) -> bool:
    """Whether a claim exceeds a limit by more than rounding."""
    return claimed > proved * (1 + TOLERANCE) + NOTHING


def not_derived(name: str, claimed: float | None, why: str) -> Figure:
    """The figure of a claim that nothing was derived for."""
    return Figure(name=name, claimed=claimed, open=why)


def in_part(name: str, claimed: float, proved: float, by: str) -> Figure:
    """The figure of a bound of an integer programme: what is proved here, and what rests on the programme's solver.

    Args:
        name, claimed: as in the certificate.
        proved: what was derived; it holds whatever the solver did.
        by: what derived it, for the sentence.
    """
    if not is_above(claimed, proved):
        return Figure(name=name, claimed=claimed, derived=claimed)
    rest = f"{by} prove {proved:.9g}; the remaining {claimed - proved:.3g} rest on the solver of the integer programme"
    return Figure(name=name, claimed=claimed, derived=proved, open=rest)


def kept_loads(plan: Plan, load_WLE: list[Float]) -> Figure:
    """The mean loads that the plan keeps for exports and comparisons."""
    if "load" not in plan.metadata:
        return not_derived("loads of the plan", None, "the plan keeps none")
    try:
        kept_LE = np.array(plan.metadata["load"], np.float64)
    except (TypeError, ValueError):
        kept_LE = np.zeros(0)
    load_LE = np.mean(load_WLE, axis=0)
    if kept_LE.shape == load_LE.shape and np.allclose(kept_LE, load_LE, rtol=LOAD_TOLERANCE, atol=0):
        return Figure(name="loads of the plan")
    return Figure(name="loads of the plan", faults=("the loads that the plan keeps are not those of the data",))


def faults_of(figures: Iterable[Figure]) -> list[str]:
    """The sentences of all figures that do not hold."""
    return [fault for figure in figures for fault in figure.faults]


def worst_of(name: str, values: Iterable[float]) -> float:
    """The worst scenario of a metric: the least balancedness, the largest of the others."""
    found = np.array(list(values), np.float64)
    return float(found.min() if name == "balancedness" else found.max())
