"""One question to the solvers, whole: hold-out split, churn, solving, validation, renumbering.

Shapes: T tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast, get_args

import numpy as np

from routing.ground.expect import expect_name

from ..contract.certificate import Robustness
from ..contract.notes import cluster_notes
from ..contract.plan import Plan
from ..contract.problem import Problem
from ..data.suspicion import has_domains, planning_notes
from ..objectives import Objective, find_objective, with_churn, without_churn
from ..objectives.churn import Churn, churn
from ..run.budget import Progress
from ..scoring.score import ordered_report
from .certify import validate_plan
from .elastic import match_gpus
from .solve import solve
from .solvers import SOLVERS

HELD_OUT = "held-out sequences"


@dataclass(frozen=True, kw_only=True, eq=False)
class SolveRequest:
    """What is asked; names are checked when it is made, before any work is done.

    Args:
        problem: what to place where; its `current` is the plan that runs now.
        objective, solver, time_limit_s, seed, robustness, balance_floor: as for `solve`.
        holdout: share of the trace's sequences, in [0, 1), that is not planned on but judged on.
        held: further data to judge on, by name.
        churn_weight: objective units per gigabyte that a layer moves away from the running plan; 0 renumbers the GPUs
            of the new plan so that least moves.

    Raises:
        ValueError: for unknown names, or a churn weight without a running plan.
    """

    problem: Problem
    objective: str | Objective = "balance"
    solver: str = "auto"
    time_limit_s: float = 30.0
    seed: int = 0
    robustness: str = "max"
    balance_floor: float | None = None
    holdout: float = 0.0
    held: Mapping[str, Problem] = field(default_factory=dict)
    churn_weight: float = 0.0

    def __post_init__(self) -> None:
        expect_name(self.solver, SOLVERS, "solver")
        expect_name(self.robustness, get_args(Robustness), "robustness")
        if isinstance(self.objective, str):
            object.__setattr__(self, "objective", find_objective(self.objective))
        if self.churn_weight and self.problem.current is None:
            raise ValueError("--churn-weight needs --current PLAN, the plan that runs now")


@dataclass(frozen=True, kw_only=True)
class SolveResult:
    """The plan with its certificate, what going there moves, and what the reader should know.

    Args:
        plan: its certificate holds the metrics on the data not planned on.
        churn: against the running plan, or None; without a known expert size its bytes are copies.
        notes: sentences about what the solvers could not take into account.
    """

    plan: Plan
    churn: Churn | None
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        certificate = self.plan.certificate
        assert certificate is not None
        moved = None if self.churn is None else vars(self.churn)
        return ordered_report(certificate.to_json() | certificate.in_sample | {"churn": moved, "notes": self.notes})


def run_request(request: SolveRequest, progress: Progress | None = None) -> SolveResult:
    """Split, solve, judge on the data held out, and number the GPUs so that least moves.

    Args:
        request: checked when it was made.
        progress: called with a phase and the share of it that is done.

    Raises:
        ValueError: as `solve` and `split_by_sequence` do.
    """
    problem, held = request.problem, dict(request.held)
    if request.holdout:
        problem, held[HELD_OUT] = split_by_sequence(problem, request.holdout, request.seed)
    objective = cast(Objective, request.objective)
    if request.churn_weight:
        objective = with_churn(objective, request.churn_weight)
    plan = solve(
        problem,
        objective=objective,
        solver=request.solver,
        time_limit_s=request.time_limit_s,
        seed=request.seed,
        robustness=cast(Robustness, request.robustness),
        balance_floor=request.balance_floor,
        progress=progress,
    )
    if request.holdout:
        plan = replace(plan, metadata={**plan.metadata, "holdout": {"share": request.holdout, "seed": request.seed}})
    plan = validate_plan(plan, held)
    moved = None
    if problem.current is not None:
        # a plan that was judged by what it moves keeps its numbers of GPUs, and so its certificate
        plan = plan if without_churn(objective) is not objective else match_gpus(problem.current, plan)
        moved = churn(problem.current, plan, plan.cluster.model.bytes_per_expert or 1.0)
    loads = {scenario.name: scenario.load_LE for scenario in problem.scenarios}
    is_broad = bool(held) or has_domains(scenario.trace for scenario in problem.scenarios)
    notes = planning_notes(loads, is_broad=is_broad)
    return SolveResult(plan=plan, churn=moved, notes=cluster_notes(plan.cluster) + notes)


def split_by_sequence(problem: Problem, share: float, seed: int) -> tuple[Problem, Problem]:
    """The problem of most sequences, and that of the held-out share of them.

    Args:
        problem: one scenario with tokens.
        share: of the sequences, between 0 and 1, that is held out; whole sequences stay together.
        seed: chooses which sequences are held out.

    Raises:
        ValueError: if there is no trace, or too few sequences to split.
    """
    trace = problem.scenarios[0].trace
    if trace is None:
        raise ValueError("--holdout splits a trace by sequence; with --loads use --validate FILE")
    sequences = np.unique(trace.sequence_T)
    held = np.random.default_rng(seed).permutation(sequences)[: round(share * len(sequences))]
    if not 0 < share < 1 or not 0 < len(held) < len(sequences):
        raise ValueError(f"--holdout {share} of {len(sequences)} sequences leaves nothing to plan on or to check with")
    is_held_T = np.isin(trace.sequence_T, held)
    replicas = problem.num_slots - problem.num_experts
    kept = Problem.from_trace(trace.select(~is_held_T), problem.cluster, replicas=replicas)
    aside = Problem.from_trace(trace.select(is_held_T), problem.cluster, replicas=replicas)
    return replace(kept, current=problem.current), aside
