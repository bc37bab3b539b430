"""The checker of plans on GPUs: it accepts what solvers make, and notices every tampering with plan or certificate."""

import copy

import numpy as np
import pytest

from placement import Cluster, Plan, Problem, generate_loads, generate_trace, solve
from placement.scoring.check import check_plan

CASES = {
    "balance": (1, 4, 4, "balance"),
    "copies on nodes": (2, 2, 8, "balance"),
    "fan-out": (2, 2, 0, "fanout+balance"),
    "fan-out with copies": (1, 4, 4, "fanout"),
    "hops": (1, 4, 0, "hops+balance"),
}


@pytest.fixture(scope="module", params=CASES)
def solved(request):
    nodes, gpus, replicas, objective = CASES[request.param]
    trace = generate_trace(tokens=300, layers=3, experts=16, top_k=3, blocks=4, tokens_per_sequence=20)
    problem = Problem.from_trace(trace, Cluster.grid(nodes, gpus), replicas=replicas)
    return problem, solve(problem, objective=objective, solver="search", time_limit_s=2, processes=1)


def swap_slots(value, draw):
    row = value["physical_to_logical_map"][int(draw.integers(3))]
    size = value["slots_per_gpu"]
    one, other = int(draw.integers(size)), int(draw.integers(size, len(row)))
    row[one], row[other] = row[other], row[one]


def name_another_expert(value, draw):
    row = value["physical_to_logical_map"][int(draw.integers(3))]
    slot = int(draw.integers(len(row)))
    row[slot] = (row[slot] + 1 + int(draw.integers(14))) % 16


def change_a_metric(value, draw):
    claims = value["certificate"]["in_sample"]
    name = str(draw.choice(["balancedness", "gpu_fanout", "node_fanout", "hops"]))
    claims[name] = claims[name] * (1 - 10.0 ** -draw.integers(1, 5)) if claims[name] else 0.5


def change_the_objective(value, draw):
    value["certificate"]["objective"] *= 1 - 10.0 ** -draw.integers(1, 5)


def claim_an_impossible_bound(value, draw):
    value["certificate"]["bound"] = value["certificate"]["objective"] * (1 + 10.0 ** -draw.integers(1, 5))


MUTATIONS = (swap_slots, name_another_expert, change_a_metric, change_the_objective, claim_an_impossible_bound)


def test_what_solvers_make_passes(solved):
    problem, plan = solved
    assert check_plan(plan, made_from=problem) == []


@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda mutate: mutate.__name__)
def test_every_tampering_is_noticed(solved, mutate):
    problem, plan = solved
    before = plan.to_json()
    for seed in range(10):
        value = copy.deepcopy(before)
        mutate(value, np.random.default_rng(seed))
        same = all(
            sorted(map(sorted, np.array(a).reshape(4, -1).tolist()))
            == sorted(map(sorted, np.array(b).reshape(4, -1).tolist()))
            for a, b in zip(value["physical_to_logical_map"], before["physical_to_logical_map"], strict=True)
        )  # GPUs that exchange all of their experts, or slots of one GPU, are the same plan
        if not (same and value["certificate"] == before["certificate"]):
            assert check_plan(Plan.from_json(value), made_from=problem), (mutate.__name__, seed)


def test_a_bound_that_the_loads_do_not_give_is_noticed():
    problem = Problem.from_loads(generate_loads(layers=4, experts=32), Cluster.grid(2, 4), replicas=8)
    plan = solve(problem, solver="eplb-global")
    assert plan.certificate.bound_name == "copies"
    value = plan.to_json()
    value["certificate"]["bound"] += (plan.certificate.objective - plan.certificate.bound) / 2
    assert "the bound is" in check_plan(Plan.from_json(value), made_from=problem)[0]
