"""The exact programme over all layers of a problem, each on its own, from the best map known."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..contract.problem import Problem
from ..data.bundles import Bundles, unique_sets
from ..objectives import Objective, PartWeights, flat_terms
from ..run.budget import Budget
from .exact import LayerModel, solve_layer

Integer = NDArray[np.int64]
MAX_BUNDLES = 20_000  # token sets of a layer; a guard against programmes that take longer to write down than to solve
FANOUT_BINARIES = 2000  # beyond it `auto` leaves fan-out to the search, whose relaxation is weak (docs/placement.md)
MAX_BINARIES = 500_000  # a guard against programmes that do not fit in memory
LEAST_S = 0.05  # too little for a programme to begin


def is_small(problem: Problem, objective: Objective, binaries: int) -> bool:
    """Whether every layer's programme has at most that many binaries and this objective has a linear form."""
    if not _is_linear(problem, objective):
        return False
    weights = objective.weights(problem.cluster)
    if weights.fan or weights.node:
        rows = max(len(_sets(problem, layer).count_B) for layer in range(problem.num_layers))
        return rows * problem.num_gpus <= 2 * min(binaries, FANOUT_BINARIES)
    return layer_model(problem, objective, 0, with_bundles=False).num_binaries <= binaries


def solve_layers_exactly(
    problem: Problem, objective: Objective, budget: Budget, start_LP: Integer, layers: Sequence[int] | None = None
) -> Integer:
    """Solve layer after layer; the bounds that are proved go to the budget.

    Args:
        problem: under uniform dispatch; with fan-out, one scenario and no replicas.
        objective: a sum of imbalance and fan-outs.
        budget: each layer gets an equal part of the time that is left when its turn comes.
        start_LP: a complete map to start from.
        layers: which layers, in this order; None takes all.

    Raises:
        ValueError: if the objective has no linear form here or a programme is too large to be written down.
    """
    if not _is_linear(problem, objective):
        raise ValueError(
            "the exact programme knows sums of balance, imbalance-price and fan-outs under uniform dispatch, and "
            f"fan-out without replicas only; objective {objective.name} needs --solver search"
        )
    binaries = layer_model(problem, objective, 0, with_bundles=False).num_binaries
    if binaries > MAX_BINARIES:
        raise ValueError(
            f"the exact programme of a layer would have {binaries} binaries, at most {MAX_BINARIES} are written down; "
            "use --solver search"
        )
    map_LP = start_LP.copy()
    chosen = range(problem.num_layers) if layers is None else layers
    for turn, layer in enumerate(chosen):
        budget.tell("exact programme", turn / len(chosen))
        share_s = budget.left_s / (len(chosen) - turn)
        if share_s < LEAST_S:
            break
        model = layer_model(problem, objective, layer)
        found_P, result = solve_layer(model, time_limit_s=share_s, start_P=map_LP[layer])
        if found_P is not None:
            map_LP[layer] = found_P
        budget.prove(layer, result.bound, problem.num_layers)
        budget.offer(map_LP)
    return map_LP


def layer_model(problem: Problem, objective: Objective, layer: int, *, with_bundles: bool = True) -> LayerModel:
    """The programme's data of one layer."""
    weights = objective.weights(problem.cluster)
    return LayerModel(
        weight_WE=problem.weight_WLE[:, layer],
        speed_G=problem.cluster.speed_G,
        node_G=problem.cluster.node_G,
        slots_per_gpu=problem.slots_per_gpu,
        level=weights.level,
        fan=weights.fan,
        node=weights.node,
        bundles=_bundles(problem, layer) if with_bundles and (weights.fan or weights.node) else None,
    )


def _is_linear(problem: Problem, objective: Objective) -> bool:
    terms = flat_terms(objective)
    units = [term.part.weights(problem.cluster) for term in terms]
    is_fan = any(unit.fan or unit.node for unit in units)
    return (
        all(term.goal is None and _is_of_one_layer(unit) for term, unit in zip(terms, units, strict=True))
        and problem.cluster.ep.dispatch == "uniform"
        and not (is_fan and (problem.num_slots > problem.num_experts or len(problem.scenarios) > 1))
    )


def _is_of_one_layer(unit: PartWeights) -> bool:
    """Fan-out and imbalance of a layer, and nothing else."""
    return bool(unit.fan or unit.node or unit.level) and not (unit.hops or unit.churn or unit.goal)


def _sets(problem: Problem, layer: int) -> Bundles:
    trace = problem.scenarios[0].trace
    assert trace is not None
    return unique_sets(trace.expert_TLK[:, layer])


def _bundles(problem: Problem, layer: int) -> Bundles:
    bundles = _sets(problem, layer)
    if len(bundles.count_B) > MAX_BUNDLES:
        raise ValueError(
            f"layer {layer} has {len(bundles.count_B)} distinct expert sets, the exact programme takes at most "
            f"{MAX_BUNDLES}; use fewer --rows or --solver search"
        )
    return bundles
