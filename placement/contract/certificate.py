"""Certificate: how good a plan is, how good any plan could be, and how that is known."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float64]
Robustness = Literal["mean", "max", "cvar"]
BELIEVED = 1e-6  # relative: how far a bound may lie above what sums prove before that is told
PROVEN = 1e-4  # relative gap below which a plan counts as optimal, as in MIP solvers


@dataclass(frozen=True, kw_only=True)
class Bound:
    """A value that no feasible plan can go below.

    Args:
        value: lower bound on the objective.
        name: which bound it is.
        value_L: the same per layer, or None if layers cannot be told apart.
    """

    value: float
    name: str
    value_L: Float | None = None


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """Objective of a plan, best valid lower bound, and the numbers beside them.

    Args:
        objective_name: the objective that was minimised, as `find_objective` reads it.
        objective: its value on the planning data.
        bound: best valid lower bound, or None if there is none for this objective.
        bound_name: which bound it is.
        gap_L: (objective - bound) / objective of each layer, where both are known.
        in_sample: metrics on the planning data.
        out_of_sample: metrics on held-out data, by name of the data.
        seconds: wall time of solving, certificate included.
        robustness: how scenarios were joined in the objective and its bound.
        dual: multipliers from which the bound can be computed again, by name of what they price; empty if none.
        data_bound: what the data and `dual` prove by sums; the rest of `bound` is of an integer programme. None in
            files from before.
    """

    objective_name: str
    objective: float
    bound: float | None
    bound_name: str
    gap_L: list[float] = field(default_factory=list)
    in_sample: dict[str, float | None] = field(default_factory=dict)
    out_of_sample: dict[str, dict[str, float | None]] = field(default_factory=dict)
    seconds: float = 0.0
    robustness: Robustness = "max"
    dual: dict[str, Any] = field(default_factory=dict)
    data_bound: float | None = None

    @property
    def gap(self) -> float | None:
        """(objective - bound) / objective, at least 0; None without a bound."""
        return None if self.bound is None else relative_gap(self.objective, self.bound)

    @property
    def bound_basis(self) -> str:
        """Which bound it is, and where an integer programme's solver has to be believed, up to where it need not."""
        if self.bound is None or self.data_bound is None or self.bound <= self.data_bound * (1 + BELIEVED):
            return self.bound_name
        return f"{self.bound_name}; {self.data_bound:.6g} without the solver's word"

    @property
    def is_proven_optimal(self) -> bool:
        """Whether the gap is within the tolerance that MIP solvers call optimal (1e-4)."""
        return self.gap is not None and self.gap <= PROVEN

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "gap": self.gap, "proven_optimal": self.is_proven_optimal}

    @classmethod
    def from_json(cls, value: Any) -> "Certificate":
        """Inverse of `to_json`; the file may come from outside.

        Raises:
            ValueError: if a key is missing, or its value is of another kind.
        """
        if not isinstance(value, dict):
            raise ValueError(f"certificate: expected a mapping; got {type(value).__name__}")
        known = {name: value[name] for name in cls.__dataclass_fields__ if name in value}
        for name, (expected, is_right) in _KINDS.items():
            if name in known and not is_right(known[name]):
                raise ValueError(f"certificate: {name} must be {expected}; got {str(known[name])[:60]}")
        try:
            return cls(**known)
        except TypeError as error:
            raise ValueError(f"certificate: {error}") from error


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and bool(np.isfinite(value))


def _are_metrics(value: Any) -> bool:
    return isinstance(value, dict) and all(one is None or _is_number(one) for one in value.values())


# what each key of a file must be, in words and as a test
_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "objective_name": ("a name", lambda value: isinstance(value, str)),
    "objective": ("a finite number", _is_number),
    "bound": ("a finite number or null", lambda value: value is None or _is_number(value)),
    "data_bound": ("a finite number or null", lambda value: value is None or _is_number(value)),
    "bound_name": ("a name", lambda value: isinstance(value, str)),
    "gap_L": ("a list of numbers", lambda value: isinstance(value, list) and all(map(_is_number, value))),
    "in_sample": ("numbers by name", _are_metrics),
    "out_of_sample": (
        "numbers by name, by name of the data",
        lambda value: isinstance(value, dict) and all(map(_are_metrics, value.values())),
    ),
    "seconds": ("a finite number", _is_number),
    "robustness": (f"one of {', '.join(get_args(Robustness))}", lambda value: value in get_args(Robustness)),
}


def relative_gap(objective: float, bound: float) -> float:
    """(objective - bound) / |objective|, 0 if the objective is 0 or rounding puts the bound above it."""
    if objective == 0:
        return 0.0
    return max(0.0, (objective - bound) / abs(objective))


def best_bound(bounds: list[Bound]) -> Bound | None:
    """The largest of several valid lower bounds."""
    return max(bounds, key=lambda bound: bound.value, default=None)
