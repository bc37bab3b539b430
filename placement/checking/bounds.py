"""What the checker of plans on GPUs knows of bounds: what the data alone prove, derived by other means than the solver.

Shares no code with the bounds on purpose: loops instead of cumulated sums, bisection instead of greedy copies, the dual
of the matching instead of the matching, and a linear programme instead of hulls. Every value is itself a valid bound.
Shapes: T tokens, E experts, G GPUs, M nodes, S slots per part.
"""

from collections import Counter

import numpy as np
from numpy.typing import NDArray

from ..contract.plan import Plan
from ..contract.problem import Scenario

Float = NDArray[np.float64]
MOST_EXPERTS = 64  # whose matching is priced; beyond it each expert takes its best companions


def least_imbalances(plan: Plan, scenario: Scenario) -> list[float]:
    """A bound on each layer's imbalance by counting: the hottest experts, or copies, and what must lie beside them."""
    return [least_imbalance(plan, load_E) for load_E in scenario.load_LE]


def least_imbalance(plan: Plan, load_E: Float) -> float:
    """The same of one layer; where copies may share unequally, nothing but the mean is certain."""
    speeds, slots = plan.cluster.speed_G, plan.num_slots
    if plan.experts_per_layer is not None:  # slots of ids that a layer does not have are free for copies
        slots += plan.num_experts - min(plan.experts_per_layer)
    mean = load_E.sum() / speeds.sum()
    if not mean:
        return 1.0
    if slots == len(load_E) and np.all(speeds == speeds[0]):
        return max(1.0, _crowded(load_E, plan.cluster.num_gpus) / float(speeds[0]) / mean)
    if plan.dispatch != "uniform" and slots > len(load_E):
        return 1.0
    return max(1.0, _least_copy(load_E, slots, plan.cluster.num_gpus) / float(speeds.max()) / mean)


def _crowded(load_E: Float, gpus: int) -> float:
    """Least load of the fullest GPU, one copy each: the h hottest lie on some q GPUs, beside the lightest at best."""
    rising = np.sort(load_E).tolist()
    slots, most = len(rising) // gpus, sum(rising) / gpus
    for hot in range(1, min(len(rising), gpus) + 1):
        top = sum(rising[-hot:])
        shared = [q for q in range(1, hot + 1) if q * slots >= hot]
        most = max(most, min((top + sum(rising[: q * slots - hot])) / q for q in shared))
    return float(most)


def _least_copy(load_E: Float, slots: int, gpus: int) -> float:
    """Least load of the heaviest copy: copies of all experts at that load must fit the slots."""
    low, high = float(load_E.max()) / gpus, float(load_E.max())
    for _ in range(60):
        middle = (low + high) / 2
        needed = np.maximum(np.ceil(load_E / middle * (1 - 1e-12)), 1).sum()
        low, high = (low, middle) if needed <= slots else (middle, high)
    return high


def least_fanouts(plan: Plan, scenario: Scenario, *, of_nodes: bool) -> list[float]:
    """A bound on each layer's distinct GPUs, or nodes, per token, for any plan with as many slots."""
    assert scenario.trace is not None
    nodes = Counter(plan.cluster.node_G.tolist())
    slots = plan.slots_per_gpu * (max(nodes.values()) if of_nodes else 1)
    found = []
    for layer in range(plan.num_layers):
        member_TK = _distinct_TK(scenario.trace.expert_TLK[:, layer], plan.num_experts)
        size_T = (member_TK < plan.num_experts).sum(axis=1)
        used_T = size_T[size_T > 0]
        least = float(np.ceil(used_T / slots).sum()) / max(len(used_T), 1)
        if plan.num_slots == plan.num_experts and len(used_T) and used_T.min() == used_T.max():
            pairs = _most_pairs(_pairs_EE(member_TK, plan.num_experts) / len(used_T), slots)
            least = max(least, _least_parts(int(used_T[0]), slots, plan.num_experts // slots, pairs))
        found.append(least)
    return found


def _distinct_TK(chosen_TK: NDArray[np.integer], experts: int) -> NDArray[np.int64]:
    """Experts of each token in rising order; what is empty or named again becomes the number of experts."""
    rising_TK = np.sort(np.where(chosen_TK < 0, experts, chosen_TK).astype(np.int64), axis=1)
    again_TK = np.zeros(rising_TK.shape, bool)
    again_TK[:, 1:] = rising_TK[:, 1:] == rising_TK[:, :-1]
    return np.where(again_TK, experts, rising_TK)


def _pairs_EE(member_TK: NDArray[np.int64], experts: int) -> Float:
    """How many tokens name both experts."""
    width, top_k = experts + 1, member_TK.shape[1]
    table = np.zeros(width * width)
    for one in range(top_k):
        for other in range(one + 1, top_k):
            table += np.bincount(member_TK[:, one] * width + member_TK[:, other], minlength=width * width)
    half_EE = table.reshape(width, width)[:experts, :experts]
    return np.asarray(half_EE + half_EE.T)


def _most_pairs(pair_EE: Float, slots: int) -> float:
    """Prices u of companions: a pair that is worth more than its two prices pays the rest; their sum is a bound.

    Every expert has S - 1 companions, so any prices prove (S - 1) * sum u + sum over pairs of max(p - u - u', 0).
    """
    from scipy import sparse
    from scipy.optimize import linprog

    experts = len(pair_EE)
    if slots >= experts:
        return float(pair_EE.sum()) / 2
    best = sum(sum(sorted(row, reverse=True)[: slots - 1]) for row in pair_EE.tolist()) / 2
    if experts > MOST_EXPERTS:
        return float(best)
    one, other = np.triu_indices(experts, 1)
    number = np.arange(len(one))
    incidence = sparse.csr_array(
        (-np.ones(3 * len(one)), (np.tile(number, 3), np.concatenate([one, other, experts + number]))),
        shape=(len(one), experts + len(one)),
    )
    cost = np.concatenate([np.full(experts, slots - 1.0), np.ones(len(one))])
    free = [(None, None)] * experts + [(0, None)] * len(one)
    done = linprog(cost, A_ub=incidence, b_ub=-pair_EE[one, other], bounds=free, method="highs")  # type: ignore[call-overload]
    if done.status != 0:
        return float(best)
    price_E = done.x[:experts]
    rest = np.maximum(pair_EE[one, other] - price_E[one] - price_E[other], 0).sum()
    return float(min(best, (slots - 1) * price_E.sum() + rest))


def _least_parts(size: int, slots: int, parts: int, pairs: float) -> float:
    """Least mean number of parts of sets of one size with so many pairs together, over mixtures of all divisions.

    Any price of a pair proves the least (parts + price * pairs) of a division minus what all pairs cost.
    """
    from scipy.optimize import linprog

    divisions = [one for one in _divisions(size) if max(one) <= slots and len(one) <= parts]
    together = [[sum(n * (n - 1) / 2 for n in one) for one in divisions]]
    done = linprog(
        [len(one) for one in divisions],
        A_ub=together,
        b_ub=[pairs],
        A_eq=np.ones((1, len(divisions))),
        b_eq=[1.0],
        method="highs",
    )
    price = max(-float(done.ineqlin.marginals[0]), 0.0) if done.status == 0 else 0.0
    priced = (len(one) + price * shared for one, shared in zip(divisions, together[0], strict=True))
    return float(min(priced) - price * pairs)


def _divisions(size: int) -> list[tuple[int, ...]]:
    """All ways to write a number as a sum of positive ones, each once."""
    found: dict[tuple[int, ...], int] = {(): 0}
    for _ in range(size):
        found |= {
            tuple(sorted((*one, n))): total + n
            for one, total in list(found.items())
            for n in range(1, size - total + 1)
        }
    return [one for one, total in found.items() if total == size]
