"""ExFlow's integer programme, as published (Yao et al. 2024, arXiv:2401.08383; YJHMITWEB/ExFlow), with PuLP.

x[n,c]: expert n (of all layers) on part c; hop[k,s] >= |x[a,c] - x[b,c]| for all c, where a and b are the experts of
token k in layers s and s + 1; minimise the mean of hop. Every part holds E / C experts of every layer. Staged: nodes
first, then the GPUs of each node. Tokens with the same pair share one hop variable, weighted by their number: the same
optimum with far fewer variables. Shapes: L layers, E experts, C parts.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pulp  # type: ignore[import-untyped]
from numpy.typing import NDArray

from .run import solve_milp

Float = NDArray[np.float64]
Integer = NDArray[np.int64]
MAX_PAIRS = 60_000  # expert pairs on 8 parts; a guard against programmes that do not fit in memory


class Pair(NamedTuple):
    """Tokens that go from the i-th member of a layer to the j-th member of the next."""

    layer: int
    i: int
    j: int
    tokens: float


def solve_exflow(
    pair_LEE: Float, members: list[Integer], parts: int, *, time_limit_s: float, start: list[Integer] | None = None
) -> list[Integer]:
    """Part of each member expert, per layer.

    Args:
        pair_LEE: [L - 1, E, E] tokens whose first choice is i and then j.
        members: the experts to place, per layer (all of them, or those of one node).
        parts: C; divides the number of members of each layer.
        time_limit_s: seconds after which the best answer so far is returned.
        start: a feasible answer to start from.

    Raises:
        ValueError: if there are more distinct pairs than a programme can carry.
    """
    pairs = _pairs(pair_LEE, members)
    if len(pairs) * parts > MAX_PAIRS * 8:
        raise ValueError(
            f"ExFlow's programme has {len(pairs)} expert pairs on {parts} parts; at most {MAX_PAIRS * 8 // parts} "
            "are taken: use fewer --rows, or --solver search"
        )
    chosen = start or [np.arange(len(experts)) * parts // len(experts) for experts in members]
    programme = _programme(pairs, [len(experts) for experts in members], parts)
    found = solve_milp(programme, time_limit_s=time_limit_s, gap_rel=1e-4, start=_values(chosen, pairs)).values
    if found is None:
        return chosen
    return [
        np.array([max(range(parts), key=lambda c: found[_name(layer, i, c)]) for i in range(len(experts))])
        for layer, experts in enumerate(members)
    ]


def _name(layer: int, i: int, c: int) -> str:
    return f"x_{layer}_{i}_{c}"


def _pairs(pair_LEE: Float, members: Sequence[Integer]) -> list[Pair]:
    return [
        Pair(layer, i, j, float(pair_LEE[layer, a, b]))
        for layer in range(len(members) - 1)
        for i, a in enumerate(members[layer])
        for j, b in enumerate(members[layer + 1])
        if pair_LEE[layer, a, b] > 0
    ]


def _programme(pairs: Sequence[Pair], sizes: Sequence[int], parts: int) -> pulp.LpProblem:
    """The mean of hop, every expert on one part, and equal shares of every layer.

    Args:
        pairs: with their numbers of tokens; each gets one hop variable.
        sizes: experts to place, per layer.
        parts: C, the number of parts, 1 or more.
    """
    programme = pulp.LpProblem("exflow", pulp.LpMinimize)
    x = {
        (layer, i, c): programme.add_variable(_name(layer, i, c), cat="Binary")
        for layer, size in enumerate(sizes)
        for i in range(size)
        for c in range(parts)
    }
    total = sum(pair.tokens for pair in pairs) or 1.0
    hop = [programme.add_variable(f"hop_{k}", lowBound=0, upBound=1) for k in range(len(pairs))]
    programme += pulp.LpAffineExpression([(h, pair.tokens / total) for h, pair in zip(hop, pairs, strict=True)])
    for layer, size in enumerate(sizes):
        for i in range(size):
            programme += pulp.LpAffineExpression([(x[layer, i, c], 1) for c in range(parts)]) == 1
        for c in range(parts):
            programme += pulp.LpAffineExpression([(x[layer, i, c], 1) for i in range(size)]) == size // parts
    _join(programme, x, hop, pairs, parts)
    return programme


def _join(programme: pulp.LpProblem, x: Mapping[Any, Any], hop: list[Any], pairs: Sequence[Pair], parts: int) -> None:
    """hop >= |x[a, c] - x[b, c]| for every pair and part."""
    for h, (layer, i, j, _) in zip(hop, pairs, strict=True):
        for c in range(parts):
            programme += pulp.LpAffineExpression([(h, 1), (x[layer, i, c], -1), (x[layer + 1, j, c], 1)]) >= 0
            programme += pulp.LpAffineExpression([(h, 1), (x[layer, i, c], 1), (x[layer + 1, j, c], -1)]) >= 0


def _values(chosen: Sequence[Integer], pairs: Sequence[Pair]) -> dict[str, float]:
    """A placement as values of the variables; those that are left out are 0."""
    values = {_name(layer, i, c): 1.0 for layer, part in enumerate(chosen) for i, c in enumerate(part.tolist())}
    hops = (float(chosen[pair.layer][pair.i] != chosen[pair.layer + 1][pair.j]) for pair in pairs)
    return values | {f"hop_{k}": hop for k, hop in enumerate(hops)}
