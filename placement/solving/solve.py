"""`solve`: run a solver, check its plan, certify it."""

import os
import time

import numpy as np
from numpy.typing import NDArray

from routing.ground.expect import expect_name

from ..contract.certificate import Robustness
from ..contract.feasibility import explain_memory
from ..contract.plan import Plan
from ..contract.problem import Problem
from ..objectives import Objective, find_objective
from ..run.budget import Budget, Progress
from .certify import certify, make_plan
from .solvers import SOLVERS, Solver

Integer = NDArray[np.int64]
SCORING_S = 3e-6  # kept for the certificate and its check per token and layer; more takes time from the search
MOST_SCORING = 0.3  # of the time limit: a search that gets less than the rest is not worth its certificate


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
        objective: a name of OBJECTIVES, an expression of names, or an objective of your own.
        solver: a name of SOLVERS; `auto` searches and proves where a gap is left and the programme is not too large.
        time_limit_s: wall time, certificate included.
        seed: for every random choice.
        robustness: how scenarios are joined.
        balance_floor: with one traced scenario, search with the least price of imbalance whose plans are expected to
            keep this balancedness, in (0, 1), on unseen data; None takes the objective's own price.
        processes: worker processes; None takes the machine's cores.
        progress: called with a phase and the share of it that is done.

    Returns:
        The plan with its certificate. Ctrl-C while solving returns the best plan so far.

    Raises:
        ValueError: if a name is unknown or the objective needs tokens that the data lacks.
        KeyboardInterrupt: if Ctrl-C comes before there is any plan, or a second time.
    """
    chosen = find_objective(objective) if isinstance(objective, str) else objective
    run = SOLVERS[expect_name(solver, SOLVERS, "solver")]
    _expect_solvable(problem, chosen, time_limit_s, balance_floor)
    began = time.perf_counter()
    budget = Budget(
        balance_floor=balance_floor,
        time_limit_s=time_limit_s - _scoring_s(problem, time_limit_s),
        seed=seed,
        processes=processes or len(os.sched_getaffinity(0)),
        progress=progress,
    )
    map_LP, is_interrupted = _run(run, problem, chosen, budget)
    plan = make_plan(problem, map_LP, solver=solver, objective=chosen)
    try:
        return certify(problem, plan, chosen, robustness, began, budget.found.proved_L)
    except KeyboardInterrupt:
        if is_interrupted:
            raise
    # Ctrl-C came while the certificate was made, for the first time: the plan is ready, so it is certified after all
    return certify(problem, plan, chosen, robustness, began, budget.found.proved_L)


def _run(run: Solver, problem: Problem, objective: Objective, budget: Budget) -> tuple[Integer, bool]:
    """The solver's map, or after Ctrl-C the best one so far; and whether Ctrl-C came."""
    try:
        return run(problem, objective, budget), False
    except KeyboardInterrupt:
        if budget.found.incumbent_LP is None:
            raise
        return budget.found.incumbent_LP, True


def _expect_solvable(problem: Problem, objective: Objective, time_limit_s: float, balance_floor: float | None) -> None:
    if objective.needs_tokens and not problem.has_tokens:
        raise ValueError(f"objective {objective.name} needs a routing trace (--trace); loads only tell balance")
    if problem.cluster.has_lower_tiers:
        try:
            explain_memory(problem.cluster, problem.num_layers, problem.slots_per_gpu, problem.num_experts)
        except ValueError as error:
            raise ValueError(f"{error}; `expertier place tiers --cluster` uses host memory and SSDs too") from error
    if not time_limit_s > 0:
        raise ValueError(f"the time limit must be positive; got {time_limit_s} s")
    if balance_floor is not None and not 0 < balance_floor < 1:
        raise ValueError(f"the balance floor must lie between 0 and 1; got {balance_floor}")


def _scoring_s(problem: Problem, time_limit_s: float) -> float:
    """Time to keep for the certificate, which looks at every token."""
    tokens = sum(scenario.trace.num_tokens for scenario in problem.scenarios if scenario.trace is not None)
    return min(tokens * problem.num_layers * SCORING_S, MOST_SCORING * time_limit_s)
