"""Copies of hot experts are counted together with placing them; EPLB where nodes are unequal."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement import Cluster, Problem, eplb, evaluate, solve
from placement.checking.check import check_plan, doubled_copies
from placement.heuristics.replication import replicate_LE
from placement.objectives import find_objective
from placement.search.copies import _counts, change_counts, choose_counts
from placement.search.levels import peaks_L

BALANCE = find_objective("balance")


def oracle(load_E, gpus, slots_per_gpu):
    """Least fullest over mean GPU over all copy counts and all ways to place them, by exhaustion.

    An expert's GPUs are a subset; with the subsets of all hot experts chosen, cold ones fill what is left.
    """
    hot = [e for e, load in enumerate(load_E) if load > 0]
    cold = len(load_E) - len(hot)
    subsets = [s for size in range(1, gpus + 1) for s in itertools.combinations(range(gpus), size)]
    best = np.inf
    for chosen in itertools.product(subsets, repeat=len(hot)):
        used = [sum(g in s for s in chosen) for g in range(gpus)]
        if max(used) > slots_per_gpu or gpus * slots_per_gpu - sum(used) < cold:
            continue
        if gpus * slots_per_gpu > sum(used) and cold == 0:
            continue  # nothing else may fill the slots
        loads = [sum(load_E[e] / len(s) for e, s in zip(hot, chosen, strict=True) if g in s) for g in range(gpus)]
        best = min(best, max(loads))
    return best * gpus / sum(load_E)


@pytest.mark.parametrize("solver", ["auto", "search"])
@pytest.mark.parametrize("hot", [1, 2, 3])
def test_few_hot_experts_reach_the_oracle(solver, hot):
    for seed in range(2):
        load = np.zeros((1, 12))
        load[0, :hot] = np.random.default_rng(seed).pareto(1.2, hot) * 1000 + 1
        problem = Problem.from_loads(load, Cluster.grid(1, 4), replicas=4)
        plan = solve(problem, solver=solver, time_limit_s=10, processes=1)
        assert check_plan(plan, made_from=problem) == []
        assert doubled_copies(plan) == 0
        best = oracle(load[0].tolist(), 4, 4)
        assert plan.certificate.objective == pytest.approx(best, rel=2e-3)
        assert plan.certificate.bound <= best * (1 + 1e-9)


def test_two_equal_experts_on_eight_gpus_are_level():
    """Greedy counts give each of them five copies, and two GPUs two: 1.6. Four each are level."""
    load = np.zeros((1, 32))
    load[0, [3, 20]] = 1000.0
    problem = Problem.from_loads(load, Cluster.grid(1, 8), replicas=8)
    assert replicate_LE(problem.weight_WLE, 40, 8)[0, [3, 20]].tolist() == [5, 5]
    plan = solve(problem, time_limit_s=5)
    assert plan.certificate.objective == pytest.approx(1.0)
    assert plan.replicas_LE[0, [3, 20]].tolist() == [4, 4]


@pytest.mark.parametrize("seed", range(3))
def test_auto_reaches_the_exact_programme_where_few_experts_are_hot(seed):
    random = np.random.default_rng(seed)
    load = np.zeros((1, 24))
    load[0, random.choice(24, 4, replace=False)] = random.pareto(1.2, 4) * 1000 + 1
    problem = Problem.from_loads(load, Cluster.grid(1, 6), replicas=6)
    auto, exact = (solve(problem, solver=solver, time_limit_s=1.5, processes=1) for solver in ("auto", "ilp"))
    assert auto.certificate.objective <= exact.certificate.objective * 1.005


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), replicas=st.sampled_from([4, 8, 20]), hot=st.integers(1, 12))
def test_counts_use_all_slots_and_never_two_on_a_gpu(seed, replicas, hot):
    weight = np.zeros((2, 3, 12))
    weight[:, :, :hot] = np.random.default_rng(seed).random((2, 3, hot))
    slots = 12 + replicas
    for count_LE in _counts(weight, slots, 4):
        assert (count_LE.sum(axis=1) == slots).all()
        assert ((count_LE >= 1) & (count_LE <= 4)).all()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000))
def test_changed_counts_keep_every_expert_and_no_doubles(seed):
    random = np.random.default_rng(seed)
    load = random.pareto(1.0, (3, 8))
    problem = Problem.from_loads(load, Cluster.grid(1, 4), replicas=8)
    map_LP = solve(problem, solver="random", seed=seed).physical_to_logical_LP
    changed_LP = change_counts(map_LP, load, 4, random)
    for row in changed_LP:
        assert set(row) == set(range(8))
        assert all(len(set(slots)) == 4 for slots in row.reshape(4, 4))
    assert (changed_LP != map_LP).sum(axis=1).max() <= 3


def test_choosing_counts_never_worsens_a_layer():
    load = np.random.default_rng(2).pareto(1.0, (4, 16))
    problem = Problem.from_loads(load, Cluster.grid(1, 4), replicas=8)
    weight, speed = problem.weight_WLE, problem.cluster.speed_G
    start = solve(problem, solver="eplb-global").physical_to_logical_LP
    chosen = choose_counts(problem, weight, start, np.zeros(4), float("inf"))
    assert (peaks_L(weight, chosen, speed) <= peaks_L(weight, start, speed) + 1e-12).all()
    done = choose_counts(problem, weight, start, np.full(4, 9.0), float("inf"))
    np.testing.assert_array_equal(done, start)


def test_scenarios_share_the_counts():
    loads = {name: np.zeros((1, 16)) for name in "ab"}
    loads["a"][0, 0], loads["b"][0, 1] = 100.0, 100.0
    problem = Problem.from_loads(loads, Cluster.grid(1, 4), replicas=8)
    plan = solve(problem, time_limit_s=3)
    assert plan.replicas_LE[0, :2].tolist() == [4, 4]
    assert plan.certificate.objective == pytest.approx(1.0)


def test_eplb_with_groups_on_unequal_nodes_is_global():
    """EPLB's arithmetic gives every node G / M GPUs; on 5 + 3 GPUs its groups would not stay on their nodes."""
    spec = {
        "model": {"expert_groups": 4},
        "node_types": {"five": {"gpus": {"count": 5}}, "three": {"gpus": {"count": 3}}},
        "nodes": [{"type": "five"}, {"type": "three"}],
    }
    load = np.random.default_rng(0).lognormal(0, 1, (2, 16))
    problem = Problem.from_loads(load, Cluster.from_mapping(spec), replicas=8)
    assert problem.cluster.num_gpus % problem.cluster.num_nodes == 0
    plan = solve(problem, solver="eplb")
    np.testing.assert_array_equal(plan.physical_to_logical_LP, eplb(load, 24, 1, 1, 8))
    odd = Cluster.from_mapping({**spec, "nodes": [{"type": "five"}, {"type": "three"}, {"type": "three"}]})
    assert check_plan(solve(Problem.from_loads(np.ones((1, 44)), odd), solver="eplb")) == []


def test_eplb_on_equal_nodes_keeps_groups_together():
    load = np.random.default_rng(0).lognormal(0, 1, (2, 16))
    cluster = Cluster.grid(2, 4, model={"expert_groups": 4})
    plan = solve(Problem.from_loads(load, cluster, replicas=8), solver="eplb")
    for row in plan.physical_to_logical_LP:
        nodes_of_group = [{int(s // 12) for s in np.flatnonzero(row // 4 == group)} for group in range(4)]
        assert all(len(nodes) == 1 for nodes in nodes_of_group)


def test_swapping_a_copied_plan_is_scored_as_it_is():
    problem = Problem.from_loads(np.array([[6.0, 2, 1, 1]]), Cluster.grid(1, 2), replicas=2)
    plan = solve(problem, solver="contiguous")
    tried = replace(plan, physical_to_logical_LP=np.array([[0, 1, 2, 0, 3, 1]]), certificate=None)
    assert evaluate(BALANCE, tried, problem) == pytest.approx(1.0)  # 3 + 1 + 1 on both
