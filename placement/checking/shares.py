"""Which GPUs get how much of an expert's tokens, copy by copy, under each rule of dispatch.

Tables are filled slot by slot with plain loops. Their last row answers for empty choices, id -1.
Shapes: E experts, G GPUs.
"""

from collections import Counter
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ..contract.plan import Plan
from .figures import NotDerivedError

Float = NDArray[np.float64]


def holders(plan: Plan, layer: int) -> dict[int, list[int]]:
    """GPUs of each expert's copies, one entry per copy."""
    found: dict[int, list[int]] = {}
    for slot, expert in enumerate(plan.physical_to_logical_LP[layer].tolist()):
        found.setdefault(expert, []).append(slot // plan.slots_per_gpu)
    return found


def shares_EG(plan: Plan, layer: int) -> Float:
    """Part of each expert's tokens on each GPU, tokens spread evenly over source GPUs.

    Raises:
        NotDerivedError: under `quota`, whose programme may have several best answers.
    """
    if plan.dispatch == "uniform":
        return _table(plan, holders(plan, layer))
    if plan.dispatch == "quota":
        raise NotDerivedError("under quota dispatch the shares are one of several best answers of a linear programme")
    sources = range(plan.cluster.num_gpus)
    return np.asarray(sum(table for _, table in _nearest(plan, layer, sources)) / len(sources))


def shares_by_source(plan: Plan, layer: int, sources: list[int]) -> Iterator[tuple[int | None, Float]]:
    """The same for tokens of each source GPU; None stands for all of them where the source does not matter."""
    if plan.dispatch == "nearest":
        yield from _nearest(plan, layer, sources)
    else:
        yield None, shares_EG(plan, layer)


def least_peak(plan: Plan, layer: int, load_E: Float) -> float:
    """Least time of the fullest GPU over all divisions of tokens between copies, by prices of GPUs.

    Prices y of GPUs with sum of speed * y = 1 prove sum of load * (cheapest holder's price); the best prices reach it.
    """
    from scipy import sparse
    from scipy.optimize import linprog

    gpus, owners = plan.cluster.num_gpus, holders(plan, layer)
    used = [expert for expert in owners if load_E[expert] > 0]
    if not used:
        return 0.0
    pairs = [(number, gpu) for number, expert in enumerate(used) for gpu in set(owners[expert])]
    rows = np.arange(len(pairs))
    expert_N, gpu_N = np.array(pairs).T
    cells = np.concatenate([np.ones(len(pairs)), -np.ones(len(pairs))])
    columns = np.concatenate([gpus + expert_N, gpu_N])
    no_dearer = sparse.csr_array((cells, (np.tile(rows, 2), columns)), shape=(len(pairs), gpus + len(used)))
    total = float(load_E.sum())
    gain = np.concatenate([np.zeros(gpus), -load_E[used] / total])
    speeds = np.concatenate([plan.cluster.speed_G, np.zeros(len(used))])[None]
    done = linprog(gain, A_ub=no_dearer, b_ub=np.zeros(len(pairs)), A_eq=speeds, b_eq=[1.0], method="highs")  # type: ignore[call-overload]
    if done.status != 0:
        raise NotDerivedError(f"the programme of the least fullest GPU ended with status {done.status}")
    return -float(done.fun) * total


def _nearest(plan: Plan, layer: int, sources: "list[int] | range") -> Iterator[tuple[int, Float]]:
    node, owners = plan.cluster.node_G.tolist(), holders(plan, layer)
    for source in sources:
        near = {
            expert: [g for g in gpus if g == source] or [g for g in gpus if node[g] == node[source]] or gpus
            for expert, gpus in owners.items()
        }
        yield source, _table(plan, near)


def _table(plan: Plan, chosen: dict[int, list[int]]) -> Float:
    table = np.zeros((plan.num_experts + 1, plan.cluster.num_gpus))
    for expert, gpus in chosen.items():
        for gpu, copies in Counter(gpus).items():
            table[expert, gpu] = copies / len(gpus)
    return table
