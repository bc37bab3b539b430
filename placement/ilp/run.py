"""Run a PuLP model and tell honestly what came out: values, dual bound, and whether it is proved.

PuLP calls a run that hit its time limit "Optimal"; here the solver's own primal status and dual bound decide.
"""

import contextlib
import math
import shutil
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import highspy
import pulp  # type: ignore[import-untyped]

SolverName = Literal["highs", "cbc"]
FEASIBLE_STATUS = 2  # highspy's kSolutionStatusFeasible
# the time limit of a programme is meant for it alone
ONE_AT_A_TIME = threading.Lock()
POLL_S = 0.1  # how soon Ctrl-C is seen; join returns at once when the programme ends


@dataclass(frozen=True, kw_only=True)
class MilpResult:
    """Outcome of one run of a minimisation.

    Args:
        values: value of each variable by name, or None if no feasible point was found.
        objective: value of that point.
        bound: valid lower bound, -inf if none.
        is_optimal: proved within the gap tolerance.
        is_infeasible: proved to have no feasible point.
    """

    values: Mapping[str, float] | None
    objective: float
    bound: float
    is_optimal: bool
    is_infeasible: bool = False


class _WarmHiGHS(pulp.HiGHS):  # type: ignore[misc]
    """PuLP 3's HiGHS cannot start from a known point; this hands one over before the run. Ctrl-C is passed on.

    highspy's own handling of Ctrl-C ends the programme and swallows the interrupt, so that whoever solves one programme
    after another would go on with the next one.
    """

    start: Mapping[str, float] | None = None

    def callSolver(self, lp: Any) -> None:
        if self.start is not None:
            solution = highspy.HighsSolution()
            solution.col_value = [float(self.start.get(variable.name, 0.0)) for variable in lp.variables()]
            lp.solverModel.setSolution(solution)
        highs = lp.solverModel
        highs.HandleUserInterrupt = True
        with ONE_AT_A_TIME:
            _run_to_its_end(highs)


def _run_to_its_end(highs: Any) -> None:
    """Run in a thread of our own, which Python waits for before it ends.

    highspy's own thread is a daemon. An interrupt between its start and the wait for it left it inside HiGHS, and a
    daemon that comes back to a Python that is ending is killed on the way: "terminate called without an active
    exception", SIGABRT.
    """
    thread = threading.Thread(target=_run, args=(highs,), name="expertier-highs")
    try:
        thread.start()
        while thread.is_alive():
            thread.join(POLL_S)
    except BaseException:  # Ctrl-C, or an alarm of whoever called
        highs.cancelSolve()
        if thread.ident is not None:
            thread.join()  # HiGHS must be out of the model before anybody frees it
        raise


def _run(highs: Any) -> None:
    """One run; its workers belong to this thread, and have ended when it does: none is there at a fork or an exit."""
    try:
        highs.run()
    finally:
        highspy.Highs.resetGlobalScheduler(True)


def solve_milp(
    model: pulp.LpProblem,
    *,
    time_limit_s: float,
    gap_rel: float = 1e-6,
    start: Mapping[str, float] | None = None,
    solver: SolverName = "highs",
    relax: bool = False,
) -> MilpResult:
    """Minimise `model`.

    Args:
        model: a PuLP model whose sense is minimisation.
        time_limit_s: wall time; a run that ends by it returns its best point and its dual bound.
        gap_rel: relative gap at which the run counts as optimal.
        start: values of a feasible point, by variable name, to start from.
        solver: `highs`, or `cbc` where its program is installed.
        relax: solve the linear relaxation.
    """
    if model.sense != pulp.LpMinimize:
        raise ValueError("models must be minimisations")
    if solver == "cbc":
        return _solve_cbc(model, time_limit_s, gap_rel)
    engine = _WarmHiGHS(msg=False, timeLimit=max(time_limit_s, 0.05), gapRel=gap_rel, threads=1, mip=not relax)
    engine.start = start
    with contextlib.suppress(KeyError):  # a HiGHS status that PuLP 3 does not know; HiGHS itself is asked below
        model.solve(engine)
    return _read_highs(model, relax)


def _read_highs(model: pulp.LpProblem, relax: bool) -> MilpResult:
    highs = model.solverModel
    info, status = highs.getInfo(), highs.getModelStatus()
    is_infeasible = status == highspy.HighsModelStatus.kInfeasible
    is_optimal = status == highspy.HighsModelStatus.kOptimal
    constant = float(model.objective.constant) if model.objective is not None else 0.0
    relaxed_bound = info.objective_function_value if is_optimal else -math.inf
    bound = relaxed_bound if relax else info.mip_dual_bound
    if info.primal_solution_status != FEASIBLE_STATUS:
        return MilpResult(
            values=None, objective=math.inf, bound=bound + constant, is_optimal=False, is_infeasible=is_infeasible
        )
    column = highs.getSolution().col_value
    values = {variable.name: column[index] for index, variable in enumerate(model.variables())}
    objective = float(info.objective_function_value) + constant
    return MilpResult(values=values, objective=objective, bound=float(bound) + constant, is_optimal=is_optimal)


def _solve_cbc(model: pulp.LpProblem, time_limit_s: float, gap_rel: float) -> MilpResult:
    """CBC gives no dual bound through PuLP; a run that it proves optimal bounds itself."""
    program = shutil.which("cbc")
    if program is None:
        raise ValueError("solver cbc: no program named cbc is on the PATH; install coinor-cbc or use highs")
    model.solve(pulp.COIN_CMD(path=program, msg=False, timeLimit=time_limit_s, gapRel=gap_rel))
    if model.sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
        infeasible = model.sol_status == pulp.LpSolutionInfeasible
        return MilpResult(values=None, objective=math.inf, bound=-math.inf, is_optimal=False, is_infeasible=infeasible)
    objective = float(pulp.value(model.objective))
    is_optimal = model.sol_status == pulp.LpSolutionOptimal
    bound = objective - abs(objective) * gap_rel if is_optimal else -math.inf
    values = {variable.name: float(variable.varValue or 0) for variable in model.variables()}
    return MilpResult(values=values, objective=objective, bound=bound, is_optimal=is_optimal)
