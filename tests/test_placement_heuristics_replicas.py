import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement import Cluster, Problem, evaluate, solve
from placement.checking.check import check_plan, doubled_copies
from placement.data.generators import generate_trace
from placement.heuristics.recount import _candidates, _changes, recount
from placement.objectives import find_objective

WORTH = np.array([[1.2, 0.3, 0, 0], [0.3, 1.2, 0, 0], [0, 0, 1.2, 0.3], [0, 0, 0.3, 1.2]])


def cost(map_P, pair_EE, weight_WE, speed_G, price):
    """By definition: price * mean level - pairs that meet."""
    G = len(speed_G)
    share_EG = np.zeros((len(pair_EE), G))
    np.add.at(share_EG, (map_P, np.arange(len(map_P)) * G // len(map_P)), 1)
    share_EG /= share_EG.sum(axis=1, keepdims=True)
    level = ((weight_WE @ share_EG) / speed_G * speed_G.sum()).max(axis=1).mean()
    return price * level - (pair_EE * (share_EG @ WORTH @ share_EG.T)).sum() / 2


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000))
def test_every_change_of_a_replica_is_exact(seed):
    random = np.random.default_rng(seed)
    E, G = 6, 4
    map_P = np.array([0, 1, 2, 0, 3, 1, 4, 5, 0, 2, 1, 3])
    pair = random.random((E, E))
    pair = np.triu(pair, 1) + np.triu(pair, 1).T
    weight, speed = random.dirichlet(np.ones(E), 2), random.uniform(0.5, 1.5, G)
    slots, experts = _candidates(map_P, E, G)
    found = _changes(map_P, slots, experts, pair, weight, speed, 0.7, WORTH)
    before = cost(map_P, pair, weight, speed, 0.7)
    for slot, expert, change in zip(slots, experts, found, strict=True):
        moved = map_P.copy()
        moved[slot] = expert
        assert cost(moved, pair, weight, speed, 0.7) - before == pytest.approx(change)
    better = recount(map_P, pair, weight, speed, price=0.7, worth_GG=WORTH)
    assert cost(better, pair, weight, speed, 0.7) <= before + 1e-12
    assert set(better) == set(range(E))


def test_search_with_replicas_keeps_plans_valid_and_beats_balance_alone():
    trace = generate_trace(tokens=1500, layers=2, experts=16, top_k=3, blocks=4, tokens_per_sequence=20)
    problem = Problem.from_trace(trace, Cluster.grid(1, 4), replicas=8)
    plan = solve(problem, objective="fanout+balance", solver="search", time_limit_s=1.2)
    assert check_plan(plan, made_from=problem) == []
    assert doubled_copies(plan) == 0
    start = solve(problem, solver="search", time_limit_s=0.4)
    assert plan.certificate.objective < evaluate(find_objective("fanout+balance"), start, problem)
