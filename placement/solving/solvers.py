"""The solvers by name, and `solve`: run one, check its plan, certify it."""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ..contract.certificate import PROVEN, Certificate
from ..contract.plan import Plan
from ..contract.problem import Problem
from ..heuristics.baselines import contiguous_LP, random_LP, round_robin_LP
from ..heuristics.eplb import eplb
from ..objectives import Objective, PartWeights, Robustness, find_objective
from ..run.blocks import one_block
from ..run.budget import Budget, Progress
from ..scoring.check import require_valid
from ..scoring.score import score
from ..search.affinity import running_LP, search_affinity
from ..search.balance import kick_and_swap, lpt_swap_LP, robust_weights
from ..search.hops.search import search_hops
from ..search.latency import search_latency
from ..search.layer import Effort
from ..search.price_choice import choose_price
from .elastic import match_gpus

Float = NDArray[np.float64]
Integer = NDArray[np.int64]
Solver = Callable[[Problem, Objective, Budget], Integer]
ILP_BINARIES = 2000
HOPS_FLOOR = 0.86  # hops alone would pile the popular experts up; --balance-floor says otherwise
SCORING_S = 2e-6  # per token and layer
SEARCH_SHARE = 0.3  # of the time, where an integer programme comes after


def solve(
    problem: Problem,
    *,
    objective: str | Objective = "balance",
    solver: str = "auto",
    time_limit_s: float = 30.0,
    seed: int = 0,
    robustness: Robustness = "max",
    balance_floor: float | None = None,
    processes: int | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Find a plan, check it independently, and certify it.

    Args:
        problem: what to place where.
        objective: a name of OBJECTIVES or an objective of your own.
        solver: a name of SOLVERS; `auto` searches and proves what is small.
        time_limit_s: wall time, certificate included.
        seed: for every random choice.
        robustness: how scenarios are joined.
        balance_floor: with one traced scenario, search with the least price of imbalance whose plans are expected to
            keep this balancedness on unseen data; None takes the objective's own price.
        processes: worker processes; None takes the machine's cores.
        progress: called with a phase and the share of it that is done.

    Returns:
        The plan with its certificate. Ctrl-C while solving returns the best plan so far.

    Raises:
        ValueError: if a name is unknown or the objective needs tokens that the data lacks.
        KeyboardInterrupt: if Ctrl-C comes before there is any plan.
    """
    chosen = find_objective(objective) if isinstance(objective, str) else objective
    if solver not in SOLVERS:
        raise ValueError(f"unknown solver {solver!r}; there are {', '.join(SOLVERS)}")
    if chosen.needs_tokens and not problem.has_tokens:
        raise ValueError(f"objective {chosen.name} needs a routing trace (--trace); loads only tell balance")
    if not time_limit_s > 0:
        raise ValueError(f"the time limit must be positive; got {time_limit_s} s")
    began = time.perf_counter()
    if balance_floor is not None and not 0 < balance_floor < 1:
        raise ValueError(f"the balance floor must lie between 0 and 1; got {balance_floor}")
    budget = Budget(
        balance_floor=balance_floor,
        time_limit_s=time_limit_s - _scoring_s(problem, time_limit_s),
        seed=seed,
        processes=processes or len(os.sched_getaffinity(0)),
        progress=progress,
    )
    try:
        map_LP = SOLVERS[solver](problem, chosen, budget)
    except KeyboardInterrupt:
        if budget.incumbent_LP is None:
            raise
        map_LP = budget.incumbent_LP
    plan = make_plan(problem, map_LP, solver=solver, objective=chosen)
    return certify(problem, plan, chosen, robustness, began, budget.proved_L)


def _scoring_s(problem: Problem, time_limit_s: float) -> float:
    """Time to keep for the certificate, which looks at every token."""
    tokens = sum(scenario.trace.num_tokens for scenario in problem.scenarios if scenario.trace is not None)
    return min(tokens * problem.num_layers * SCORING_S, 0.3 * time_limit_s)


def make_plan(problem: Problem, map_LP: Integer, *, solver: str, objective: Objective) -> Plan:
    """The plan of a map, without a certificate."""
    return Plan(
        physical_to_logical_LP=map_LP,
        num_experts=problem.num_experts,
        cluster=problem.cluster,
        layer_ids=problem.layer_ids,
        hidden_layers=problem.hidden_layers,
        dispatch=problem.cluster.ep.dispatch,
        solver=solver,
        objective_name=objective.name,
        metadata={"load": problem.load_WLE.mean(axis=0).round(3).tolist()},
    )


def certify(
    problem: Problem,
    plan: Plan,
    objective: Objective,
    robustness: Robustness,
    began: float,
    proved_L: Float | None = None,
) -> Plan:
    """Attach the certificate and check plan and certificate with independent code.

    Args:
        problem, plan, objective, robustness: what was solved, and how.
        began: `time.perf_counter()` at the start.
        proved_L: lower bounds per layer that the solver proved itself, or None.
    """
    found = score(problem, plan, objective, robustness=robustness, proved_L=proved_L)
    certificate = Certificate(
        objective_name=objective.name,
        objective=found.objective,
        bound=found.bound,
        bound_name=found.bound_name,
        gap_L=found.gap_L,
        in_sample={
            "balancedness": found.balancedness,
            "gpu_fanout": found.gpu_fanout,
            "node_fanout": found.node_fanout,
            "hops": found.hops,
        },
        seconds=time.perf_counter() - began,
    )
    plan = plan.with_certificate(certificate)
    require_valid(plan, problem)
    return plan


def validate_plan(plan: Plan, held: Mapping[str, Problem]) -> Plan:
    """Add the plan's metrics on held-out data to its certificate."""
    if plan.certificate is None or not held:
        return plan
    found = {}
    for name, data in held.items():
        scored = score(data, plan, "balance")
        found[name] = {key: getattr(scored, key) for key in ("balancedness", "gpu_fanout", "node_fanout", "hops")}
    return plan.with_certificate(replace(plan.certificate, out_of_sample=found))


def _shape(problem: Problem) -> tuple[int, int, int, int]:
    return problem.num_layers, problem.num_experts, problem.num_slots, problem.num_gpus


def _contiguous(problem: Problem, objective: Objective, budget: Budget) -> Integer:
    return contiguous_LP(*_shape(problem))


def _round_robin(problem: Problem, objective: Objective, budget: Budget) -> Integer:
    return round_robin_LP(*_shape(problem))


def _random(problem: Problem, objective: Objective, budget: Budget) -> Integer:
    return random_LP(*_shape(problem), budget.seed)


def _eplb(problem: Problem, objective: Objective, budget: Budget) -> Integer:
    return _eplb_map(problem, problem.groups)


def _eplb_global(problem: Problem, objective: Objective, budget: Budget) -> Integer:
    return _eplb_map(problem, 1)


def _eplb_map(problem: Problem, groups: int) -> Integer:
    nodes = problem.cluster.num_nodes
    if problem.num_gpus % nodes:
        raise ValueError(f"EPLB needs equal nodes; {problem.num_gpus} GPUs on {nodes} nodes are not")
    return eplb(problem.load_WLE.sum(axis=0), problem.num_slots, groups, nodes if groups > 1 else 1, problem.num_gpus)


def _lpt(problem: Problem, objective: Objective, budget: Budget) -> Integer:
    block, blocks = one_block(problem, pairs=False)
    return np.tile(lpt_swap_LP(block, block.weight_WLE, budget.deadline), (1, blocks))


def _search(problem: Problem, objective: Objective, budget: Budget) -> Integer:
    """Balance first; then, for objectives of the tokens' sets, fan-out or hops from there; very many GPUs by blocks."""
    weights = objective.weights(problem.cluster)
    block, budget.blocks = one_block(problem, pairs=bool(weights.fan or weights.node or weights.hops or weights.churn))
    if budget.blocks > 1 and weights.churn:
        raise ValueError(f"churn is searched for up to {block.num_gpus} GPUs; got {problem.num_gpus}")
    return np.tile(_search_block(block, objective, budget, weights), (1, budget.blocks))


def _search_block(problem: Problem, objective: Objective, budget: Budget, weights: PartWeights) -> Integer:
    weight_WLE = robust_weights(problem.weight_WLE)
    start_LP = running_LP(problem) if weights.churn else None
    map_LP = lpt_swap_LP(problem, weight_WLE, budget.deadline) if start_LP is None else start_LP
    if weights.churn and problem.current is not None:
        target = make_plan(problem, map_LP, solver="search", objective=objective)
        map_LP = match_gpus(problem.current, target).physical_to_logical_LP
    budget.offer(map_LP)
    if weights.hops:
        if weights.churn or weights.goal:
            raise ValueError("the search knows hops with weighted fan-out and balance only, without churn or goals")
        floor = budget.balance_floor or (None if weights.level else HOPS_FLOOR)
        return search_hops(problem, map_LP, budget, weights, floor=floor)
    if budget.balance_floor is not None:
        weights = choose_price(problem, weights, budget)
    if weights.fan or weights.node or weights.churn:
        return search_affinity(problem, map_LP, budget, weights, effort=Effort())
    if objective.name == "latency":
        start = make_plan(problem, map_LP, solver="search", objective=objective)
        return search_latency(problem, start, objective, budget)
    return kick_and_swap(problem, weight_WLE, map_LP, budget)


def _ilp(problem: Problem, objective: Objective, budget: Budget) -> Integer:
    from ..ilp.layers import solve_layers_exactly

    map_LP = _search(problem, objective, budget.part(SEARCH_SHARE))
    budget.offer(map_LP)
    return solve_layers_exactly(problem, objective, budget, map_LP)


def _lns(problem: Problem, objective: Objective, budget: Budget) -> Integer:
    """Search, then large neighbourhoods by integer programming for the rest of the time."""
    from ..ilp.neighbourhood import improve_by_neighbourhoods

    map_LP = _search(problem, objective, budget.part(SEARCH_SHARE))
    budget.offer(map_LP)
    return improve_by_neighbourhoods(problem, map_LP, objective, budget)


def _moetuner(problem: Problem, objective: Objective, budget: Budget) -> Integer:
    from ..ilp.published import moetuner_LP

    return moetuner_LP(problem, budget)


def _exflow(problem: Problem, objective: Objective, budget: Budget) -> Integer:
    from ..ilp.published import exflow_LP

    return exflow_LP(problem, budget)


def _auto(problem: Problem, objective: Objective, budget: Budget) -> Integer:
    """Search; then prove and improve by integer programming what is small enough for it."""
    from ..ilp.layers import is_small, solve_layers_exactly

    if not is_small(problem, objective, ILP_BINARIES):
        return _search(problem, objective, budget)
    map_LP = _search(problem, objective, budget.part(SEARCH_SHARE))
    budget.offer(map_LP)
    found = score(problem, make_plan(problem, map_LP, solver="auto", objective=objective), objective)
    if found.gap is not None and found.gap <= PROVEN:
        return map_LP
    return solve_layers_exactly(problem, objective, budget, map_LP)


SOLVERS: dict[str, Solver] = {
    "auto": _auto,
    "contiguous": _contiguous,
    "round-robin": _round_robin,
    "random": _random,
    "eplb": _eplb,
    "eplb-global": _eplb_global,
    "lpt": _lpt,
    "search": _search,
    "ilp": _ilp,
    "lns": _lns,
    "moetuner": _moetuner,
    "exflow": _exflow,
}
