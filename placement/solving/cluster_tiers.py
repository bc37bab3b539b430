"""Experts over all memories of a cluster: relaxation, rounding, local search, integer programme, certificate.

Shapes: L layers, E experts, W scenarios, U memory pools.
"""

import contextlib
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from routing.ground.expect import expect_name

from ..checking.tiers import tier_faults
from ..contract.certificate import PROVEN, Certificate, relative_gap
from ..contract.plan import Plan
from ..contract.problem import Problem
from ..tiers.exchange import TierSearch
from ..tiers.layout import OBJECTIVE, named_multipliers, plan_of, scenario_seconds
from ..tiers.model import TierModel, tier_model
from ..tiers.relaxation import Relaxed, relax
from ..tiers.rounding import round_shares

Float = NDArray[np.float64]
Integer = NDArray[np.int64]
Progress = Callable[[str, float], None]
TIER_SOLVERS = ("auto", "search", "ilp")
RELAX_SHARE = 0.5  # of the time limit at most, for the relaxation. Untried elsewhere
SEARCH_SHARE = 0.4  # of what is then left, where an integer programme comes after. Untried elsewhere
MOST_BINARIES = 12_000  # that `auto` writes down: at 10,752 the programme's bound was the relaxation's within 60 s
DESCENT_SHARE = 0.3  # of what is left, for the first descent at least. Untried elsewhere
SMALL_BINARIES = 4000  # programmes that come before any kick: 3,840 (24 x 32 on one machine) took 1 s to be proved
ILP_BINARIES = 200_000  # a guard for `ilp` against programmes that do not fit in memory
KEPT_S = 0.05  # of the time limit for the certificate


def solve_cluster_tiers(
    problem: Problem,
    *,
    expert_bytes: float | Float | None = None,
    solver: str = "auto",
    time_limit_s: float = 60.0,
    seed: int = 0,
    progress: Progress | None = None,
) -> Plan:
    """Find a home for every expert that minimises modelled seconds per step, with a certificate.

    Args:
        problem: its cluster file has memories, rates and `tiers`.
        expert_bytes: bytes of one expert: one size or [L]; None takes the cluster file's.
        solver: `search`; `ilp` adds the integer programme over all layers; `auto` does where it is small.
        time_limit_s: wall time. The first plan is made whatever it is.
        seed: of the search's random kicks.
        progress: called with a phase and the share of it that is done.

    Returns:
        A plan with `homes`. Ctrl-C after the first plan returns the best so far.

    Raises:
        ValueError: if sizes are not known, or the experts do not fit in all memories together (with what is short).
    """
    expect_name(solver, TIER_SOLVERS, "solver")
    if not time_limit_s > 0:
        raise ValueError(f"the time limit must be positive; got {time_limit_s} s")
    began, tell = time.perf_counter(), progress or _silent
    deadline = time.monotonic() + time_limit_s * (1 - KEPT_S)
    model = tier_model(problem, expert_bytes)
    tell("relaxation", 0.0)
    relaxed = relax(model, RELAX_SHARE * time_limit_s)
    search = TierSearch(model, round_shares(model, relaxed), seed)
    found = _Found(relaxed)
    with contextlib.suppress(KeyboardInterrupt):
        _improve(model, search, found, solver, deadline, tell)
    return _certified(problem, model, search.way_LE, found, solver, began)


class _Found:
    """The best bound, and where it is from."""

    def __init__(self, relaxed: Relaxed) -> None:
        self.relaxed, self.bound, self.name = relaxed, relaxed.bound, "relaxation"

    def offer(self, bound: float, name: str) -> None:
        if bound > self.bound * (1 + 1e-9):
            self.bound, self.name = bound, name

    def is_proven(self, seconds: float) -> bool:
        return relative_gap(seconds, self.bound) <= PROVEN


def _improve(model: TierModel, search: TierSearch, found: _Found, solver: str, deadline: float, tell: Progress) -> None:
    from ..ilp.tiers import num_binaries

    layers = range(model.shape[0])
    most = {"search": 0, "auto": MOST_BINARIES, "ilp": ILP_BINARIES}[solver]
    is_written = num_binaries(model, layers) <= most
    if solver == "ilp" and not is_written:
        raise ValueError(f"the programme would have {num_binaries(model, layers)} binaries, at most {most} are taken")
    is_small = num_binaries(model, layers) <= SMALL_BINARIES
    share = (0.0 if is_small else SEARCH_SHARE) if is_written else 1.0
    end = time.monotonic() + share * max(deadline - time.monotonic(), 0)
    began = time.monotonic()
    search.descend(max(end, began + DESCENT_SHARE * max(deadline - began, 0)))
    while time.monotonic() < end and not found.is_proven(search.seconds):
        tell("search", min((time.monotonic() - began) / max(end - began, 1e-9), 1.0))
        search.kick(end)
    if is_written and not found.is_proven(search.seconds):
        tell("integer programme", 0.0)
        _programme(model, search, found, deadline)


def _programme(model: TierModel, search: TierSearch, found: _Found, deadline: float) -> None:
    from ..ilp.tiers import solve_tiers

    limit = max(deadline - time.monotonic(), 0.05)
    way_LE, result = solve_tiers(model, range(model.shape[0]), model.ways.capacity_U, search.way_LE, time_limit_s=limit)
    found.offer(result.bound, "MIP dual")
    if model.seconds(way_LE) < search.seconds:
        search.way_LE = way_LE


def _certified(problem: Problem, model: TierModel, way_LE: Integer, found: _Found, solver: str, began: float) -> Plan:
    seconds = model.seconds(way_LE)
    certificate = Certificate(
        objective_name=OBJECTIVE,
        objective=seconds,
        bound=min(found.bound, seconds),
        bound_name=found.name,
        in_sample=dict(scenario_seconds(model, way_LE)),
        seconds=time.perf_counter() - began,
        dual=named_multipliers(model, found.relaxed.multipliers),
        data_bound=min(found.relaxed.bound, seconds),
    )
    plan = plan_of(problem, model, way_LE, certificate, solver)
    if faults := tier_faults(plan, problem, searches=False):
        raise RuntimeError(f"the plan failed its check: {'; '.join(faults[:4])}")
    return plan


def _silent(phase: str, share: float) -> None:
    """Nobody watches."""
