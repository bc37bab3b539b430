import itertools

import numpy as np
import pytest

from placement import Cluster, Problem, evaluate, solve
from placement.data.generators import generate_trace
from placement.objectives import find_objective
from placement.objectives.hops import first_choice_TL, hop_share
from placement.objectives.latency import ingress_cost_G
from placement.solving.solvers import make_plan

MODEL = {"hidden": 256, "moe_intermediate": 64, "top_k": 2}


def cluster(matrix):
    return Cluster.from_mapping(
        {
            "model": MODEL,
            "node_types": {"n": {"gpus": {"count": len(matrix)}}},
            "nodes": [{"type": "n"}],
            "links": {"rank_cost_matrix": matrix},
        }
    )


@pytest.fixture
def trace():
    return generate_trace(tokens=200, layers=2, experts=4, top_k=2, blocks=2, tokens_per_sequence=10)


def test_hops_count_what_each_pair_of_gpus_costs(trace):
    matrix = np.array([[0.0, 1.0], [3.0, 0.0]])
    problem = Problem.from_trace(trace, cluster(matrix.tolist()))
    plan = solve(problem, objective="hops", solver="contiguous")
    gpu_TL = first_choice_TL(trace) // 2
    expected = np.mean([matrix[a, b] for a, b in gpu_TL.tolist()]) / 2
    assert plan.certificate.objective == pytest.approx(expected)
    assert hop_share(plan, trace) == pytest.approx((gpu_TL[:, 0] != gpu_TL[:, 1]).mean())


def test_equal_costs_are_no_costs(trace):
    plain = solve(Problem.from_trace(trace, Cluster.grid(1, 2, model=MODEL)), objective="hops", solver="contiguous")
    same = solve(Problem.from_trace(trace, cluster([[0, 7], [7, 0]])), objective="hops", solver="contiguous")
    assert same.certificate.objective == pytest.approx(plain.certificate.objective)


def test_search_for_hops_equals_brute_force_under_costs(trace):
    matrix = [[0, 1, 9, 9], [1, 0, 9, 9], [9, 9, 0, 1], [9, 9, 1, 0]]
    problem = Problem.from_trace(trace, cluster(matrix))
    objective = find_objective("hops")
    found = solve(problem, objective="1*hops", solver="search", time_limit_s=4, balance_floor=0.01)
    orders = list(itertools.permutations(range(4)))
    best = min(
        evaluate(objective, make_plan(problem, np.array([a, b]), solver="x", objective=objective), problem)
        for a in orders
        for b in orders
    )
    assert found.certificate.objective == pytest.approx(best, abs=1e-6)


def test_latency_counts_the_cost_of_the_fullest_gpu(trace):
    load = np.array([[9.0, 1.0, 1.0, 1.0]])
    costs = [[0, 1, 1, 5], [1, 0, 1, 5], [1, 1, 0, 5], [1, 1, 1, 0]]
    problem = Problem.from_loads(load, cluster(costs))
    np.testing.assert_allclose(ingress_cost_G(problem.cluster), np.array([3, 3, 3, 15]) / 6)
    worst = make_plan(problem, np.array([[1, 2, 3, 0]]), solver="x", objective=find_objective("latency"))
    best = solve(problem, objective="latency", solver="search", time_limit_s=3)
    assert best.physical_to_logical_LP[0, 3] != 0
    assert best.certificate.objective < evaluate(find_objective("latency"), worst, problem)
    even = make_plan(problem, np.array([[0, 1, 2, 3]]), solver="x", objective=find_objective("latency"))
    assert best.certificate.objective == pytest.approx(evaluate(find_objective("latency"), even, problem))
