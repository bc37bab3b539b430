"""Starts for the search: alternating exact transport on the co-activation of items, with a Lagrangian price on load.

Given a partition, the affinity of item x to group g is the co-activation of x with the members of g. Giving every item
a group at once, best total affinity minus price * load, is a transport problem, solved exactly; repeat from the result.
Shapes: X items, A groups, S items per group.
"""

import time

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float64]
Integer = NDArray[np.int64]
ROUNDS = 12  # transports of one start at most; it stops before if nothing rises. Untried elsewhere


def transport_starts(
    pair_XX: Float,
    weight_X: Float,
    groups: int,
    *,
    starts: int,
    keep: int,
    price: float,
    random: np.random.Generator,
    deadline: float = float("inf"),
) -> list[Integer]:
    """The best `keep` of `starts` runs from random partitions.

    Args:
        pair_XX: co-activation counts, diagonal 0; very negative where two items may not share a group.
        weight_X: load of each item, summing to 1.
        groups: A; divides the number of items.
        starts, keep: how many runs, how many results.
        price: what one unit of (fullest / mean - 1) costs, as a share of all co-activation.
        random: source of the starts.
        deadline: `time.monotonic()` after which no further run and no further round begins.
    """
    size = len(weight_X) // groups
    total = float(np.maximum(pair_XX, 0).sum()) / 2 or 1.0
    found = []
    for _ in range(starts):
        group_X = random.permutation(np.arange(len(weight_X)) // size)
        found.append(_alternate(pair_XX / total, weight_X, group_X, groups, price, deadline))
        if time.monotonic() > deadline:
            break
    found.sort(key=lambda pair: pair[0])
    return [group_X for _, group_X in found[:keep]]


def _alternate(
    pair_XX: Float, weight_X: Float, group_X: Integer, groups: int, price: float, deadline: float
) -> tuple[float, Integer]:
    from scipy.optimize import linear_sum_assignment

    size = len(weight_X) // groups
    column_group = np.repeat(np.arange(groups), size)
    best_value, best_X = _value(pair_XX, weight_X, group_X, groups, price), group_X
    for _ in range(ROUNDS):
        if time.monotonic() > deadline:
            break
        member_XA = (group_X[:, None] == np.arange(groups)).astype(np.float64)
        affinity_XA = pair_XX @ member_XA
        excess_XA = weight_X @ member_XA - weight_X[:, None] * member_XA - 1 / groups
        cost_XA = price * groups * weight_X[:, None] * excess_XA * groups - affinity_XA
        _, column = linear_sum_assignment(cost_XA[:, column_group])
        moved_X = column_group[column]
        value = _value(pair_XX, weight_X, moved_X, groups, price)
        if value >= best_value - 1e-12:
            break
        best_value, best_X, group_X = value, moved_X, moved_X
    return best_value, best_X


def _value(pair_XX: Float, weight_X: Float, group_X: Integer, groups: int, price: float) -> float:
    inside = float(pair_XX[group_X[:, None] == group_X].sum()) / 2
    fullest = float(np.bincount(group_X, weights=weight_X, minlength=groups).max()) * groups
    return price * (fullest - 1) - inside
