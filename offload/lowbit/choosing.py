"""Bits for every matrix of every expert under a budget of bytes: an integer programme, solved by HiGHS through SciPy.

Source: MC-MoE (arXiv:2410.06270), which weighs errors by how often and how much experts are used.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from routing.ground.quantity import format_size

from .measuring import Option, Unit

GAP = 1e-4
"""Share of the cost by which the choice may exceed the least possible."""
TIME_LIMIT_S = 60.0
"""For the programme; the best choice that is found by then is taken, and its gap is reported. Not tuned."""


@dataclass(frozen=True)
class Choice:
    """A way to store each unit.

    Args:
        options: chosen, in the order of the units.
        nbytes: of all.
        cost: of all.
        bound: no choice under the budget costs less.
    """

    options: tuple[Option, ...]
    nbytes: int
    cost: float
    bound: float


def choose(units: Sequence[Unit], budget_bytes: int) -> Choice:
    """The choice of least cost.

    Args:
        units: matrices with their options.
        budget_bytes: for all of them.

    Raises:
        ValueError: if even the smallest options do not fit.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array, vstack

    kept = [_worth_choosing(unit.options) for unit in units]
    least = sum(options[0].nbytes for options in kept)
    if least > budget_bytes:
        raise ValueError(
            f"{format_size(max(budget_bytes, 0))} are left for experts, and the fewest bits for each take "
            f"{format_size(least)}; give a larger --fit"
        )
    sizes = np.array([option.nbytes for options in kept for option in options], dtype=float)
    costs = np.array([option.cost for options in kept for option in options])
    unit_of = np.repeat(np.arange(len(kept)), [len(options) for options in kept])
    one_each = csr_array((np.ones(len(sizes)), (unit_of, np.arange(len(sizes)))))
    scale, unit_cost = float(budget_bytes), float(costs.max()) or 1.0
    found = milp(
        costs / unit_cost,
        integrality=np.ones(len(sizes)),
        bounds=Bounds(0, 1),
        constraints=LinearConstraint(
            vstack([one_each, csr_array(sizes[None] / scale)]),
            np.r_[np.ones(len(kept)), -np.inf],
            np.r_[np.ones(len(kept)), 1.0],
        ),
        options={"mip_rel_gap": GAP, "time_limit": TIME_LIMIT_S},
    )
    if found.x is None:
        raise ArithmeticError(f"HiGHS found no choice of bits: {found.message}")
    starts = np.r_[0, np.cumsum([len(options) for options in kept])[:-1]]
    chosen = tuple(
        options[int(np.argmax(found.x[start : start + len(options)]))]
        for options, start in zip(kept, starts, strict=True)
    )
    nbytes = sum(option.nbytes for option in chosen)
    bound = float(found.mip_dual_bound) * unit_cost if found.mip_dual_bound is not None else 0.0
    return Choice(chosen, nbytes, sum(option.cost for option in chosen), bound)


def _worth_choosing(options: Sequence[Option]) -> list[Option]:
    """Options by size, without those that cost no less than a smaller one."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda option: (option.nbytes, option.cost)):
        if not kept or option.cost < kept[-1].cost:
            kept.append(option)
    return kept
