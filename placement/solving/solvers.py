"""The literal table of solvers: each row is a function that gives a map for a problem within a budget.

A solver offers every complete map to its budget, so that Ctrl-C returns the best one, and looks at the clock.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ..contract.certificate import PROVEN
from ..contract.problem import Problem
from ..heuristics.baselines import biased_counts_LE, contiguous_LP, random_LP, round_robin_LP
from ..heuristics.eplb import eplb
from ..heuristics.fill import fill_LP
from ..heuristics.first import first_LP
from ..heuristics.lplb import lplb_LP
from ..heuristics.lpt import lpt_LP
from ..heuristics.replication import slots_of
from ..objectives import Objective, PartWeights
from ..run.blocks import one_block
from ..run.budget import Budget
from ..scoring.score import score
from ..search.affinity import running_LP, search_affinity
from ..search.balance import kick_and_swap, lpt_start_LP, lpt_swap_LP, robust_weights
from ..search.batches import search_batches
from ..search.hops.search import search_hops
from ..search.latency import search_latency
from ..search.layer import Effort
from ..search.price_choice import choose_price
from .certify import make_plan
from .elastic import match_gpus

Integer = NDArray[np.int64]
Solver = Callable[[Problem, Objective, Budget], Integer]
HOPS_FLOOR = 0.86  # hops alone would pile the popular experts up; --balance-floor says otherwise
SEARCH_SHARE = 0.3  # of the time, where an integer programme comes after. Untried elsewhere
SMALL_BINARIES = 2000  # programmes of a layer that `auto` always tries to prove. Untried elsewhere
LARGE_BINARIES = 20_000  # that it tries only for LARGE_GAP, since they may take all of the time. Untried elsewhere
LARGE_GAP = 0.01  # relative gap per layer that is worth the rest of the time. Untried elsewhere


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
    """Groups go to nodes as wholes where nodes are equal; EPLB's arithmetic knows no others, so else it is global."""
    nodes = problem.cluster.num_nodes if groups > 1 and problem.cluster.gpus_per_node is not None else 1
    return eplb(problem.load_WLE.sum(axis=0), problem.num_slots, groups, nodes, problem.num_gpus)


def _first(problem: Problem, objective: Objective, budget: Budget) -> Integer:
    return first_LP(problem.load_WLE.sum(axis=0), problem.num_slots, problem.num_gpus)


def _fill(problem: Problem, objective: Objective, budget: Budget) -> Integer:
    """Copies into the slots that the running plan leaves free; the others stay as they are."""
    running, gpus = problem.current, problem.num_gpus
    if running is None:
        raise ValueError("solver fill adds copies to the plan that runs now: give it with --current")
    now, free = running.slots_per_gpu, running.cluster.ep.spare_slots
    if running.cluster.num_gpus != gpus or running.homes is not None:
        raise ValueError(f"solver fill needs a running plan that keeps all experts on as many GPUs; here are {gpus}")
    if not now < problem.slots_per_gpu <= now + free:
        least, most = ((now + more) * gpus - problem.num_experts for more in (1, free))
        raise ValueError(
            f"the running plan has {now} slots on each GPU and leaves {free} free; {problem.slots_per_gpu} are asked "
            f"for: use --replicas {least} to {most}"
        )
    load_LE = problem.load_WLE.sum(axis=0)
    return fill_LP(running.physical_to_logical_LP, load_LE, problem.slots_per_gpu, problem.cluster.speed_G)


def _lplb(problem: Problem, objective: Objective, budget: Budget) -> Integer:
    return lplb_LP(problem.load_WLE.sum(axis=0), problem.num_slots, problem.num_gpus)


def _biased(problem: Problem, objective: Objective, budget: Budget) -> Integer:
    load_LE = problem.load_WLE.sum(axis=0)
    count_LE = biased_counts_LE(load_LE, problem.num_slots, problem.num_gpus)
    return lpt_LP((load_LE / count_LE)[None], slots_of(count_LE), problem.cluster.speed_G)


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
    if start_LP is None:
        budget.offer(lpt_start_LP(problem, weight_WLE))
        start_LP = lpt_swap_LP(problem, weight_WLE, budget.deadline)
    map_LP = start_LP
    budget.offer(map_LP)
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
    if objective.name == "batches":
        return search_batches(problem, map_LP, budget)
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
    """Search; then prove and improve by integer programming the layers whose gap asks for it."""
    from ..ilp.layers import is_small, solve_layers_exactly

    if not is_small(problem, objective, LARGE_BINARIES):
        return _search(problem, objective, budget)
    map_LP = _search(problem, objective, budget.part(SEARCH_SHARE))
    budget.offer(map_LP)
    found = score(problem, make_plan(problem, map_LP, solver="auto", objective=objective), objective)
    gap_L = np.array(found.gap_L or [np.inf] * problem.num_layers)
    least = PROVEN if is_small(problem, objective, SMALL_BINARIES) else LARGE_GAP
    layers = [int(layer) for layer in np.argsort(-gap_L, kind="stable") if gap_L[layer] > least]
    return solve_layers_exactly(problem, objective, budget, map_LP, layers) if layers else map_LP


SOLVERS: dict[str, Solver] = {
    "auto": _auto,
    "contiguous": _contiguous,
    "round-robin": _round_robin,
    "random": _random,
    "eplb": _eplb,
    "eplb-global": _eplb_global,
    "first": _first,
    "lplb": _lplb,
    "fill": _fill,
    "biased": _biased,
    "lpt": _lpt,
    "search": _search,
    "ilp": _ilp,
    "lns": _lns,
    "moetuner": _moetuner,
    "exflow": _exflow,
}
