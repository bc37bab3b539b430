"""The exact programme over all layers of a problem, each on its own, from the best map known."""

import numpy as np
from numpy.typing import NDArray

from ..contract.problem import Problem
from ..data.bundles import Bundles, unique_sets
from ..objectives import Objective, PartWeights, flat_terms
from ..run.budget import Budget
from .exact import LayerModel, solve_layer

Integer = NDArray[np.int64]
MAX_BUNDLES = 20_000
MAX_BINARIES = 500_000
LEAST_S = 0.05


def is_small(problem: Problem, objective: Objective, binaries: int) -> bool:
    """Whether every layer's programme has at most that many binaries and this objective has a linear form."""
    if not _is_linear(problem, objective):
        return False
    weights = objective.weights(problem.cluster)
    if weights.fan or weights.node:
        rows = max(len(_bundles(problem, layer).count_B) for layer in range(problem.num_layers))
        return rows * problem.num_gpus <= 2 * binaries
    return layer_model(problem, objective, 0, with_bundles=False).num_binaries <= binaries


def solve_layers_exactly(problem: Problem, objective: Objective, budget: Budget, start_LP: Integer) -> Integer:
    """Solve layer after layer; the bound that is proved is kept in `budget.proved_L`."""
    if not _is_linear(problem, objective):
        raise ValueError(
            "the exact programme knows sums of balance, imbalance-price and fan-outs under uniform dispatch, fan-out only "
            f"without replicas; objective {objective.name} needs --solver search"
        )
    binaries = layer_model(problem, objective, 0, with_bundles=False).num_binaries
    if binaries > MAX_BINARIES:
        raise ValueError(
            f"the exact programme of a layer would have {binaries} binaries, at most {MAX_BINARIES} are written down; "
            "use --solver search"
        )
    map_LP = start_LP.copy()
    for layer in range(problem.num_layers):
        budget.tell("exact programme", layer / problem.num_layers)
        share_s = budget.left_s / (problem.num_layers - layer)
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


def _bundles(problem: Problem, layer: int) -> Bundles:
    trace = problem.scenarios[0].trace
    assert trace is not None
    bundles = unique_sets(trace.expert_TLK[:, layer])
    if len(bundles.count_B) > MAX_BUNDLES:
        raise ValueError(
            f"layer {layer} has {len(bundles.count_B)} distinct expert sets, the exact programme takes at most "
            f"{MAX_BUNDLES}; use fewer --rows or --solver search"
        )
    return bundles
