"""Every row of SOLVERS on every small problem: a valid plan within its bound, or a refusal with the reason."""

import itertools
import os
import signal
import threading
from dataclasses import replace

import numpy as np
import pytest

from placement import SOLVERS, Cluster, Plan, Problem, evaluate, generate_trace, solve
from placement.bounds.choice import objective_bound
from placement.checking.check import check_plan, doubled_copies
from placement.objectives import find_objective

UNEQUAL = {
    "model": {"expert_groups": 4},
    "node_types": {"big": {"gpus": {"count": 3}}, "small": {"gpus": {"count": 1}}},
    "nodes": [{"type": "big"}, {"type": "small", "speed": 0.5}],
}


def random_loads(layers=3, experts=8, seed=0):
    load = np.random.default_rng(seed).lognormal(0, 1, (layers, experts))
    load[1] = 0
    return load


def hot_loads():
    load = np.zeros((1, 16))
    load[0, [3, 7]] = [50.0, 50.0]
    return load


def small_trace(seed=0):
    return generate_trace(tokens=80, layers=2, experts=8, top_k=2, blocks=4, tokens_per_sequence=10, seed=seed)


PROBLEMS = {
    "loads": (lambda: Problem.from_loads(random_loads(), Cluster.grid(1, 4)), "balance"),
    "copies": (
        lambda: Problem.from_loads(random_loads(), Cluster.grid(2, 2, model={"expert_groups": 4}), replicas=4),
        "balance",
    ),
    "two scenarios": (
        lambda: Problem.from_loads(
            {"a": random_loads(seed=1), "b": random_loads(seed=2)}, Cluster.grid(1, 4), replicas=4
        ),
        "balance",
    ),
    "unequal nodes and groups": (
        lambda: Problem.from_loads(random_loads(), Cluster.from_mapping(UNEQUAL), replicas=4),
        "balance",
    ),
    "two hot experts": (lambda: Problem.from_loads(hot_loads(), Cluster.grid(1, 8), replicas=8), "balance"),
    "activated": (lambda: Problem.from_loads(random_loads(), Cluster.grid(1, 4), replicas=4), "activated"),
    "tokens": (lambda: Problem.from_trace(small_trace(), Cluster.grid(1, 4)), "fanout+balance"),
    "tokens on nodes": (lambda: Problem.from_trace(small_trace(), Cluster.grid(2, 2)), "fanout"),
    "tokens and copies": (lambda: Problem.from_trace(small_trace(), Cluster.grid(2, 2), replicas=4), "fanout+balance"),
    "tokens on unequal nodes": (
        lambda: Problem.from_trace(small_trace(), Cluster.from_mapping(UNEQUAL)),
        "node-fanout",
    ),
    "batches": (lambda: Problem.from_trace(small_trace(), Cluster.grid(1, 4), replicas=4), "batches"),
    "goal": (lambda: Problem.from_trace(small_trace(), Cluster.grid(1, 4)), "balance<=1.2,gpu-fanout"),
    "hops": (lambda: Problem.from_trace(small_trace(), Cluster.grid(1, 4)), "hops+balance"),
    "one GPU": (lambda: Problem.from_loads(random_loads(), Cluster.grid(1, 1)), "balance"),
}
NO_COPIES, NO_TOKENS = "knows no replicas", "needs a routing trace"
ONLY_TOKENS = {
    "loads": NO_TOKENS,
    "copies": NO_COPIES,
    "two scenarios": NO_COPIES,
    "unequal nodes and groups": NO_COPIES,
    "two hot experts": NO_COPIES,
    "activated": NO_COPIES,
    "tokens and copies": NO_COPIES,
    "batches": NO_COPIES,
    "one GPU": NO_TOKENS,
}
REFUSALS: dict[str, dict[str, str]] = {
    "auto": {},
    "contiguous": {},
    "round-robin": {},
    "random": {},
    "eplb": {},
    "eplb-global": {},
    "first": {},
    "biased": {},
    "lplb": {},
    "fill": dict.fromkeys(PROBLEMS, "give it with --current"),
    "lpt": {},
    "search": {},
    "ilp": {
        "activated": "needs --solver search",
        "tokens and copies": "fan-out without replicas only",
        "batches": "needs --solver search",
        "goal": "needs --solver search",
        "hops": "needs --solver search",
    },
    "lns": {"hops": "hops join layers"},
    "moetuner": ONLY_TOKENS,
    "exflow": ONLY_TOKENS | {"tokens on unequal nodes": "need equal nodes"},
}


def test_every_solver_says_what_it_refuses():
    assert set(REFUSALS) == set(SOLVERS)
    assert all(set(refused) <= set(PROBLEMS) for refused in REFUSALS.values())


@pytest.mark.parametrize("case", PROBLEMS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_valid_plan_within_its_bound_or_a_refusal(solver, case):
    make, text = PROBLEMS[case]
    problem, objective = make(), find_objective(text)
    if words := REFUSALS[solver].get(case):
        with pytest.raises(ValueError, match=words):
            solve(problem, objective=text, solver=solver, time_limit_s=0.25)
        return
    plan = solve(problem, objective=text, solver=solver, time_limit_s=0.25, processes=1)
    assert check_plan(plan, made_from=problem) == []
    assert plan.layer_ids == problem.layer_ids
    assert (plan.solver, plan.objective_name) == (solver, text)
    found = evaluate(objective, plan, problem)
    assert plan.certificate.objective == pytest.approx(found)
    assert plan.certificate.bound <= found + 1e-12
    assert objective_bound(objective, problem, plan, "max").value <= found + 1e-9
    assert 0 <= plan.certificate.gap < 1
    if solver in ("auto", "search", "lns", "ilp", "lpt", "random"):
        assert doubled_copies(plan) == 0
    assert Plan.from_json(plan.to_json()).to_json() == plan.to_json()


@pytest.mark.parametrize("case", ["copies", "tokens", "tokens and copies"])
@pytest.mark.parametrize("solver", ["search", "random", "lpt", "eplb", "contiguous", "round-robin"])
def test_a_seed_decides_all(solver, case):
    make, text = PROBLEMS[case]
    first, second = (
        solve(make(), objective=text, solver=solver, time_limit_s=60, seed=5, processes=1) for _ in range(2)
    )
    np.testing.assert_array_equal(first.physical_to_logical_LP, second.physical_to_logical_LP)


def test_random_plans_differ_by_seed():
    problem = PROBLEMS["loads"][0]()
    first, second = (solve(problem, solver="random", seed=seed).physical_to_logical_LP for seed in (0, 1))
    assert (first != second).any()


# The exact programme and the search against all plans of a tiny problem.


def brute_optimum(problem, objective):
    """Over every way to fill the GPUs of one layer; layers do not share these objectives."""
    plan = solve(problem, solver="contiguous")
    contents = list(itertools.combinations(range(problem.num_experts), problem.slots_per_gpu))
    best = np.inf
    for chosen in itertools.product(contents, repeat=problem.num_gpus):
        row = [e for one in chosen for e in one]
        if len(set(row)) == problem.num_experts:
            tried = replace(plan, physical_to_logical_LP=np.array([row]), certificate=None)
            best = min(best, evaluate(objective, tried, problem))
    return best


ORACLES = {
    "balance": (6, 3, 0, "balance"),
    "balance with copies": (4, 2, 2, "balance"),
    "balance with more copies": (5, 3, 4, "balance"),
    "fan-out": (6, 3, 0, "fanout"),
    "fan-out and balance": (6, 3, 0, "fanout+balance"),
    "weighted": (6, 2, 0, "0.3*balance+gpu-fanout"),
}


@pytest.mark.parametrize("case", ORACLES)
@pytest.mark.parametrize("solver", ["ilp", "auto", "search", "lns"])
def test_small_optima_are_found(solver, case):
    experts, gpus, replicas, text = ORACLES[case]
    for seed in range(2):
        trace = generate_trace(tokens=40, layers=1, experts=experts, top_k=2, blocks=2, seed=seed)
        problem = Problem.from_trace(trace, Cluster.grid(1, gpus), replicas=replicas)
        best = brute_optimum(problem, find_objective(text))
        plan = solve(problem, objective=text, solver=solver, time_limit_s=0.5 if solver == "lns" else 20, processes=1)
        assert plan.certificate.objective == pytest.approx(best, rel=1e-6)
        if solver == "ilp":
            assert plan.certificate.is_proven_optimal


# Refusals that no problem is needed for.


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"solver": "serch"}, "unknown solver 'serch' .did you mean 'search'"),
        ({"objective": "balanse"}, "unknown objective 'balanse' .did you mean 'balance'"),
        ({"objective": "hops"}, "needs a routing trace"),
        ({"time_limit_s": 0}, "time limit must be positive"),
        ({"time_limit_s": float("nan")}, "time limit must be positive"),
        ({"balance_floor": 1.0}, "balance floor must lie between 0 and 1"),
    ],
)
def test_settings_are_refused_before_any_work(settings, words):
    problem = Problem.from_loads(random_loads(), Cluster.grid(1, 4))
    with pytest.raises(ValueError, match=words):
        solve(problem, **settings)


def test_many_distinct_sets_do_not_stop_auto():
    """The exact programme takes 20,000 sets of a layer; the search takes any number."""
    trace = generate_trace(tokens=21_500, layers=1, experts=64, top_k=8, tokens_per_sequence=500)
    plan = solve(Problem.from_trace(trace, Cluster.grid(1, 2)), objective="fanout", time_limit_s=1, processes=1)
    assert check_plan(plan) == []


@pytest.mark.parametrize("robustness", ["max", "mean", "cvar"])
def test_what_is_proved_for_the_worst_scenario_is_no_bound_on_others(robustness):
    loads = {"a": np.array([[9.0, 1, 1, 1]]), "b": np.array([[1.0, 1, 1, 9]]), "c": np.array([[3.0, 3, 3, 3]])}
    problem = Problem.from_loads(loads, Cluster.grid(1, 2))
    plan = solve(problem, solver="ilp", robustness=robustness, time_limit_s=10)
    for row in itertools.permutations(range(4)):
        tried = replace(plan, physical_to_logical_LP=np.array([row]), certificate=None)
        assert plan.certificate.bound <= evaluate(find_objective("balance"), tried, problem, robustness) + 1e-9


# Ctrl-C in every phase.


class Stop:
    """A progress callback that presses Ctrl-C at its n-th call."""

    def __init__(self, at):
        self.at, self.calls = at, []

    def __call__(self, phase, share):
        self.calls.append(phase)
        if len(self.calls) == self.at:
            raise KeyboardInterrupt


INTERRUPTED = {
    "lns": ("fanout+balance", 0, None),
    "ilp": ("balance", 4, None),
    "auto": ("balance", 4, None),
    "search": ("fanout+balance", 0, None),
    "search with a floor": ("fanout+balance", 0, 0.9),
    "search for hops": ("hops", 0, None),
    "lns with copies": ("fanout+balance", 4, None),
    "moetuner": ("hops", 0, None),
    "exflow": ("hops", 0, None),
}


@pytest.mark.parametrize("name", INTERRUPTED)
def test_ctrl_c_returns_a_plan_from_every_phase(name):
    text, replicas, floor = INTERRUPTED[name]
    trace = generate_trace(tokens=360, layers=2, experts=8, top_k=2, blocks=4, tokens_per_sequence=10)
    problem = Problem.from_trace(trace, Cluster.grid(1, 4), replicas=replicas)
    seen, at = set(), 1
    while True:
        stop = Stop(at)
        plan = solve(
            problem,
            objective=text,
            solver=name.split(" ")[0],
            time_limit_s=0.5,
            balance_floor=floor,
            processes=1,
            progress=stop,
        )
        assert check_plan(plan, made_from=problem) == []
        assert plan.certificate is not None
        if len(stop.calls) < at:
            break
        if stop.calls[-1] in seen:  # each phase once early and once late is enough
            at = 2 * at
        else:
            at += 1
        seen.add(stop.calls[-1])
    assert seen


HOOKS = {
    "swaps of the start": ("placement.search.balance.balance_by_swaps", "lns"),
    "a layer's search": ("placement.search.affinity.search_layer", "lns"),
    "the tabu search": ("placement.search.layer.tabu_search", "search"),
    "a neighbourhood": ("placement.ilp.neighbourhood.solve_layer", "lns"),
    "the model of a neighbourhood": ("placement.ilp.neighbourhood.SearchState", "lns"),
    "the exact programme": ("placement.ilp.layers.solve_layer", "ilp"),
    "the gap that chooses the programme": ("placement.solving.solvers.score", "auto"),
    "the certificate": ("placement.solving.certify.score", "search"),
}


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("at", [1, 2])
def test_ctrl_c_inside_a_call_returns_a_plan(hook, at, monkeypatch):
    target, solver = HOOKS[hook]
    module, _, name = target.rpartition(".")
    real, calls = getattr(__import__(module, fromlist=[name]), name), []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == at:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(target, interrupted)
    problem = PROBLEMS["tokens"][0]()
    objective = "balance" if solver in ("ilp", "auto") else "fanout+balance"
    plan = solve(problem, objective=objective, solver=solver, time_limit_s=0.5, processes=1)
    assert calls
    assert check_plan(plan, made_from=problem) == []


def test_a_second_ctrl_c_ends_the_certificate(monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("placement.solving.certify.score", interrupted)
    with pytest.raises(KeyboardInterrupt):
        solve(PROBLEMS["loads"][0](), solver="search")


def test_ctrl_c_inside_highs_is_passed_on():
    """highspy's own handling swallows it, and the next programme would begin."""
    load = np.random.default_rng(3).lognormal(0, 1, (6, 40))
    problem = Problem.from_loads(load, Cluster.grid(1, 8), replicas=8)
    phases = []

    def tell(phase, share):
        if phase == "exact programme" and phase not in phases:
            threading.Timer(0.8, os.kill, (os.getpid(), signal.SIGINT)).start()
        phases.append(phase)

    plan = solve(problem, solver="ilp", time_limit_s=60, progress=tell)
    assert check_plan(plan, made_from=problem) == []
    assert phases.count("exact programme") <= 2
    assert plan.certificate.seconds < 40
