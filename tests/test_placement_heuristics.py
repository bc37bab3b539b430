"""What the quick rules, the feasibility hints and the budget promise, against plain loops and brute force."""

import itertools
import re
from dataclasses import replace

import numpy as np
import pulp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement import Cluster, Problem, solve
from placement.contract.feasibility import explain_slots
from placement.heuristics.baselines import contiguous_LP, random_LP, round_robin_LP
from placement.heuristics.lpt import lpt_LP, separate_copies
from placement.heuristics.replication import counts_of, replicate_LE, slots_of
from placement.heuristics.swaps import balance_by_swaps
from placement.ilp.exact import LayerModel, solve_layer
from placement.ilp.run import solve_milp
from placement.run.blocks import first_gpus, is_periodic, one_block
from placement.run.budget import Budget
from placement.run.workers import in_workers
from placement.search.levels import peaks_L
from placement.search.transport import transport_starts


def spreads(experts, slots, gpus):
    """Every way to give experts 1 to `gpus` copies that use all slots."""
    for count in itertools.product(range(1, gpus + 1), repeat=experts):
        if sum(count) == slots:
            yield np.array(count)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), slots=st.sampled_from([4, 6, 8, 12]), scenarios=st.sampled_from([1, 2]))
def test_greedy_counts_minimise_the_heaviest_copy(seed, slots, scenarios):
    weight_WLE = np.random.default_rng(seed).pareto(1.0, (scenarios, 1, 4))
    count = replicate_LE(weight_WLE, slots, 3)[0]
    best = min((weight_WLE[:, 0] / tried).max() for tried in spreads(4, slots, 3))
    assert count.sum() == slots
    assert count.max() <= 3
    assert (weight_WLE[:, 0] / count).max() == pytest.approx(best)
    assert counts_of(slots_of(count[None]), 4).tolist() == [count.tolist()]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), copies=st.sampled_from([0, 4, 8]), uneven=st.booleans())
def test_lpt_and_swaps_keep_copies_apart_and_never_worsen(seed, copies, uneven):
    random = np.random.default_rng(seed)
    speed = random.uniform(0.5, 1.5, 4) if uneven else np.ones(4)
    weight = random.pareto(1.0, (2, 3, 8)) + 0.01
    count = replicate_LE(weight, 8 + copies, 4)
    start = lpt_LP(weight / count, slots_of(count), speed)
    better = balance_by_swaps(weight / count, start, speed, target_L=np.zeros(3))
    for map_LP in (start, better):
        assert counts_of(map_LP, 8).tolist() == count.tolist()
        for row in map_LP:
            assert all(len(set(slots)) == len(slots) for slots in row.reshape(4, -1).tolist())
    assert (peaks_L(weight, better, speed) <= peaks_L(weight, start, speed) * (1 + 1e-12)).all()
    by_loops = [
        max(
            sum(weight[w, layer, e] / count[layer, e] for e in better[layer].reshape(4, -1)[g]) / speed[g]
            for w in range(2)
            for g in range(4)
        )
        for layer in range(3)
    ]
    np.testing.assert_allclose(peaks_L(weight, better, speed), by_loops)


def test_baselines_by_hand():
    assert contiguous_LP(1, 4, 6, 2).tolist() == [[0, 1, 2, 3, 0, 1]]
    assert round_robin_LP(1, 4, 4, 2).tolist() == [[0, 2, 1, 3]]
    np.testing.assert_array_equal(random_LP(2, 6, 6, 2, 1), random_LP(2, 6, 6, 2, 1))
    with pytest.raises(ValueError, match="cannot be spread over 2 GPUs"):
        separate_copies(np.array([[0, 0, 0, 1]]), 2)


@settings(max_examples=60, deadline=None)
@given(experts=st.integers(1, 40), gpus=st.integers(1, 12), replicas=st.integers(0, 60))
def test_whatever_the_refusal_recommends_is_feasible(experts, gpus, replicas):
    try:
        explain_slots(experts, experts + replicas, gpus, from_slots_per_gpu=False)
    except ValueError as error:
        text = str(error)
        hints = re.search(r"use (?:at most )?--replicas ([0-9]+)(?: or ([0-9]+))?", text)
        if hints:
            for hint in filter(None, hints.groups()):
                if experts + int(hint) <= experts * gpus:
                    explain_slots(experts, experts + int(hint), gpus, from_slots_per_gpu=False)
        if others := re.search(r", or ([0-9]+) GPUs", text):
            assert (experts + replicas) % int(others[1]) == 0
    else:
        assert (experts + replicas) % gpus == 0
        problem = Problem.from_loads(np.ones((1, experts)), Cluster.grid(1, gpus), replicas=replicas)
        assert solve(problem, solver="contiguous").num_slots == experts + replicas


def test_transport_finds_pairs_that_fire_together_and_keeps_copies_apart():
    random = np.random.default_rng(0)
    pair = 0.1 * random.random((6, 6))
    pair = np.triu(pair, 1) + np.triu(pair, 1).T
    for x, y in ((0, 3), (1, 5), (2, 4)):
        pair[x, y] = pair[y, x] = 1.0
    settings = {"starts": 40, "keep": 2, "price": 0.0, "random": random}
    found = transport_starts(pair, np.full(6, 1 / 6), 3, **settings)
    assert len(found) == 2
    assert all(found[0][x] == found[0][y] for x, y in ((0, 3), (1, 5), (2, 4)))
    assert all(np.bincount(group).tolist() == [2, 2, 2] for group in found)
    pair[0, 3] = pair[3, 0] = -1e12
    apart = transport_starts(pair, np.full(6, 1 / 6), 3, **settings)[0]
    assert apart[0] != apart[3]


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 999), floor=st.sampled_from([0.0, 2.0]))
def test_the_exact_layer_bears_several_scenarios_and_a_least_peak(seed, floor):
    random = np.random.default_rng(seed)
    weight, speed = random.dirichlet(np.ones(6), 2), np.array([1.0, 0.5, 1.5])
    model = LayerModel(
        weight_WE=weight, speed_G=speed, node_G=np.zeros(3, int), slots_per_gpu=2, level=0.7, least_peak=floor
    )
    row, result = solve_layer(model, time_limit_s=20)

    def cost(row):
        load_WG = weight[:, list(row)].reshape(2, 3, 2).sum(axis=2)
        return 0.7 * max(floor, (load_WG / speed * speed.sum()).max())

    best = min(cost(tried) for tried in itertools.permutations(range(6)))
    assert cost(row) == pytest.approx(best, rel=1e-5)
    assert result.bound == pytest.approx(best, rel=1e-4)


def test_a_milp_says_what_it_knows():
    model = pulp.LpProblem("small", pulp.LpMinimize)
    x = [model.add_variable(f"x{i}", cat="Binary") for i in range(3)]
    model += pulp.LpAffineExpression([(one, cost) for one, cost in zip(x, (3, 2, 4), strict=True)]) + 1
    model += pulp.LpAffineExpression([(one, 1) for one in x]) >= 2
    found = solve_milp(model, time_limit_s=5)
    assert (found.objective, found.bound, found.is_optimal) == (6, 6, True)
    assert [found.values[f"x{i}"] for i in range(3)] == [1, 1, 0]
    model += pulp.LpAffineExpression([(one, 1) for one in x]) <= 1
    nothing = solve_milp(model, time_limit_s=5)
    assert nothing.values is None
    assert nothing.is_infeasible
    with pytest.raises(ValueError, match="minimisations"):
        solve_milp(pulp.LpProblem("other", pulp.LpMaximize), time_limit_s=1)


def test_blocks_are_found_only_where_machines_repeat():
    cluster = Cluster.grid(4, 2)
    assert [size for size in range(1, 9) if 8 % size == 0 and is_periodic(cluster, size)] == [2, 4, 8]
    assert is_periodic(Cluster.grid(1, 8), 2)
    slower = replace(cluster, speed_G=np.array([1, 1, 1, 1, 1, 1, 1, 0.5]))
    assert not is_periodic(slower, 4)
    assert first_gpus(cluster, 4).num_nodes == 2
    problem = Problem.from_loads(np.ones((1, 8)), cluster)
    assert one_block(problem, pairs=True) == (problem, 1)


def test_a_part_of_a_budget_finds_into_the_whole_and_a_trial_does_not():
    told = []
    budget = Budget(time_limit_s=100, progress=lambda phase, share: told.append(phase))
    part, trial = budget.part(0.5), budget.trial(0.5)
    assert part.deadline < budget.deadline
    trial.offer(np.zeros((1, 2), int))
    trial.tell("trial", 0.5)
    assert budget.found.incumbent_LP is None
    part.blocks = 2
    part.offer(np.array([[1, 0]]))
    assert budget.found.incumbent_LP.tolist() == [[1, 0, 1, 0]]
    part.prove(1, 3.0, 2)
    budget.prove(1, 2.0, 2)
    assert budget.found.proved_L.tolist() == [-np.inf, 3.0]
    part.tell("part", 0.1)
    assert told == ["part"]
    assert Budget(time_limit_s=0).left_s == 0


def double(number):
    return 2 * number


@pytest.mark.parametrize("processes", [1, 2])
def test_workers_answer_in_order(processes):
    assert list(in_workers(double, iter(range(5)), processes)) == [0, 2, 4, 6, 8]
