"""Goals, sums and churn in objectives; neighbourhood search; the balance floor."""

import numpy as np
import pytest

from placement import Cluster, Plan, Problem, evaluate, generate_trace, score, solve
from placement.checking.check import check_plan, doubled_copies
from placement.ilp.neighbourhood import improve_by_neighbourhoods
from placement.objectives import find_objective, with_churn
from placement.objectives.churn import churn
from placement.run.budget import Budget
from placement.search.price_choice import choose_price


@pytest.fixture
def problem():
    trace = generate_trace(tokens=1500, layers=3, experts=16, top_k=3, blocks=4, tokens_per_sequence=20)
    return Problem.from_trace(trace, Cluster.grid(1, 4, model={"expert_bytes": 1e9}))


def contiguous(problem):
    return solve(problem, solver="contiguous")


def test_sums_and_goals_by_hand():
    load = np.array([[4.0, 2.0, 1.0, 1.0]])
    problem = Problem.from_loads(load, Cluster.grid(1, 2))
    plan = contiguous(problem)  # GPUs hold 6 and 2 of 8: fullest over mean 1.5
    assert evaluate(find_objective("2*balance+balance"), plan, problem) == pytest.approx(4.5)
    assert evaluate(find_objective("balance<=1.4"), plan, problem) == pytest.approx(0.1)
    assert evaluate(find_objective("balance<=1.4,balance"), plan, problem) == pytest.approx(100 * 0.1 + 1.5)
    scored = score(problem, plan, "balance<=1.4,balance")
    assert scored.bound == pytest.approx(1.25)  # the hottest expert with the lightest companion: 5 of 8 on one of two


@pytest.mark.parametrize("text", ["balance,fanout", "magic<=1,fanout", "x*balance", "balance<=much,fanout"])
def test_wrong_expressions_are_refused(text):
    with pytest.raises(ValueError, match=r"goal|unknown|weight"):
        find_objective(text)


def test_a_goal_is_kept_first_and_then_fanout_falls(problem):
    strict = solve(problem, objective="balance<=1.05,fanout", solver="search", time_limit_s=0.7)
    loose = solve(problem, objective="balance<=1.5,fanout", solver="search", time_limit_s=1.4)
    assert strict.certificate.in_sample["balancedness"] > 1 / 1.15
    assert strict.certificate.in_sample["balancedness"] >= loose.certificate.in_sample["balancedness"]
    assert loose.certificate.in_sample["gpu_fanout"] <= strict.certificate.in_sample["gpu_fanout"]
    with pytest.raises(ValueError, match="goals of balance only"):
        find_objective("fanout<=2,balance").weights(problem.cluster)


@pytest.mark.slow
def test_churn_weight_trades_moves_for_quality(problem):
    running = contiguous(problem)
    again = Problem.from_trace(problem.scenarios[0].trace, problem.cluster)
    again = type(again)(**{**vars(again), "current": running})
    moved = []
    for weight in (0.001, 0.02, 100.0):
        plan = solve(again, objective=with_churn(find_objective("fanout+balance"), weight), time_limit_s=2)
        assert check_plan(plan, made_from=again) == []
        moved.append(churn(running, plan).moved_copies)
        assert plan.certificate.bound <= plan.certificate.objective
    assert moved[0] > moved[1] > moved[2] == 0
    # without the running plan the churn part is left out, and the price of imbalance stays
    assert score(problem, plan).objective == pytest.approx(score(problem, plan, "fanout+balance").objective)


@pytest.mark.slow
def test_churn_counts_when_the_cluster_grows(problem):
    running = contiguous(problem)
    grown = Problem.from_trace(problem.scenarios[0].trace, Cluster.grid(1, 8, model={"expert_bytes": 1e9}))
    grown = type(grown)(**{**vars(grown), "current": running})
    careful = solve(grown, objective="fanout+balance+10*churn", time_limit_s=1.5)
    afresh = solve(grown, objective="fanout+balance", time_limit_s=1.5)
    assert churn(running, careful).moved_copies <= churn(running, afresh).moved_copies


def test_churn_of_loads_with_replicas():
    load = np.random.default_rng(0).lognormal(0, 1, (2, 16))
    first = Problem.from_loads(load, Cluster.grid(1, 8, model={"expert_bytes": 1e9}), replicas=8)
    running = solve(first, time_limit_s=0.4)
    drifted = Problem.from_loads(
        load * np.random.default_rng(1).lognormal(0, 0.3, load.shape), first.cluster, replicas=8
    )
    drifted = type(drifted)(**{**vars(drifted), "current": running})
    some = solve(drifted, objective=with_churn(find_objective("balance"), 0.01), time_limit_s=0.4)
    afresh = solve(drifted, time_limit_s=0.4)
    assert check_plan(some, made_from=drifted) == []
    assert churn(running, some).moved_copies < churn(running, afresh).moved_copies
    with pytest.raises(ValueError, match=r"--current"):
        solve(first, objective=with_churn(find_objective("balance"), 0.01))


@pytest.mark.slow
@pytest.mark.parametrize("replicas", [0, 4])
def test_neighbourhoods_improve_a_bad_plan_and_never_worsen_one(problem, replicas):
    wide = Problem.from_trace(problem.scenarios[0].trace, problem.cluster, replicas=replicas)
    objective = find_objective("fanout+balance")
    start = solve(wide, objective=objective, solver="lpt")
    budget = Budget(time_limit_s=20, seed=1)
    map_LP = improve_by_neighbourhoods(wide, start.physical_to_logical_LP, objective, budget, tries=6)
    better = Plan.from_json({**start.to_json(), "physical_to_logical_map": map_LP.tolist(), "certificate": None})
    assert check_plan(better, made_from=wide) == []
    assert doubled_copies(better) == 0
    assert evaluate(objective, better, wide) < evaluate(objective, start, wide)


@pytest.mark.slow
def test_small_integer_programme_is_proved():
    load = np.random.default_rng(5).lognormal(0, 1, (2, 32))
    plan = solve(Problem.from_loads(load, Cluster.grid(1, 8)), solver="ilp", time_limit_s=30)
    assert plan.certificate.is_proven_optimal


@pytest.mark.slow
def test_balance_floor_raises_the_price_until_it_is_kept(problem):
    weights = find_objective("fanout+balance").weights(problem.cluster)
    low, high = (
        choose_price(problem, weights, Budget(time_limit_s=6, balance_floor=floor)).level for floor in (0.5, 0.97)
    )
    assert low < high
    with pytest.raises(ValueError, match="one trace and an objective of fan-out and balance"):
        solve(problem, objective="fanout", balance_floor=0.9)
