"""The checker of plans on GPUs: it accepts what solvers make, and notices every tampering with plan or certificate."""

import copy
from dataclasses import replace

import numpy as np
import pytest

from placement import Cluster, Plan, Problem, generate_loads, generate_trace, solve
from placement.bounds.choice import objective_bound
from placement.checking.check import check_plan
from placement.checking.objective import bounds_again
from placement.objectives import find_objective

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
    return problem, solve(problem, objective=objective, solver="search", time_limit_s=0.4, processes=1)


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


def claim_what_is_not_proved(value, draw):
    """A bound between what the data prove and the objective; the gap of a layer follows, or not."""
    certificate = value["certificate"]
    room = certificate["objective"] - certificate["bound"]
    certificate["bound"] += room * draw.uniform(0.2, 0.9)
    if draw.random() < 0.5:
        certificate["gap_L"] = [gap * 0.5 for gap in certificate["gap_L"]]


def change_a_gap(value, draw):
    gaps = value["certificate"]["gap_L"]
    layer = int(draw.integers(len(gaps)))
    gaps[layer] = float(draw.choice([gaps[layer] / 2 + 0.5, -0.1, 2.0]))


def lose_a_gap(value, draw):
    value["certificate"]["gap_L"].pop()


OF_BOUNDS = (claim_what_is_not_proved, change_a_gap, lose_a_gap)
MUTATIONS = (
    *(swap_slots, name_another_expert, change_a_metric, change_the_objective, claim_an_impossible_bound),
    *OF_BOUNDS,
)


def test_what_solvers_make_passes(solved):
    problem, plan = solved
    assert check_plan(plan, made_from=problem) == []


@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda mutate: mutate.__name__)
def test_every_tampering_is_noticed(solved, mutate):
    problem, plan = solved
    before = plan.to_json()
    certificate = plan.certificate
    is_derived = "hops" not in plan.objective_name and "MIP" not in certificate.bound_name
    if mutate in OF_BOUNDS and not (is_derived and certificate.bound < certificate.objective * 0.999):
        pytest.skip("hops have the bound 0; a bound that is reached leaves nothing to claim")
    for seed in range(5):
        value = copy.deepcopy(before)
        mutate(value, np.random.default_rng(seed))
        same = all(
            sorted(map(sorted, np.array(a).reshape(4, -1).tolist()))
            == sorted(map(sorted, np.array(b).reshape(4, -1).tolist()))
            for a, b in zip(value["physical_to_logical_map"], before["physical_to_logical_map"], strict=True)
        )  # GPUs that exchange all of their experts, or slots of one GPU, are the same plan
        if not (same and value["certificate"] == before["certificate"]):
            assert check_plan(Plan.from_json(value), made_from=problem), (mutate.__name__, seed)


@pytest.mark.parametrize("seed", range(10))
def test_other_data_than_the_planning_data_are_noticed(solved, seed):
    """One token in a hundred chose another expert."""
    problem, plan = solved
    trace = problem.scenarios[0].trace
    draw = np.random.default_rng(seed)
    expert_TLK = trace.expert_TLK.copy()
    for token in draw.choice(trace.num_tokens, trace.num_tokens // 100, replace=False):
        layer = draw.integers(trace.num_layers)
        unused = np.setdiff1d(np.arange(16), expert_TLK[token, layer])
        expert_TLK[token, layer, draw.integers(3)] = draw.choice(unused)
    other = Problem.from_trace(replace(trace, expert_TLK=expert_TLK), plan.cluster, replicas=plan.num_slots - 16)
    assert check_plan(plan, made_from=other)


def test_bounds_by_other_means_are_the_bounds(solved):
    """What the checker derives equals what the solver claims, layer by layer, and not only bounds it."""
    problem, plan = solved
    found = bounds_again(plan, problem, plan.objective_name, "max")
    theirs = objective_bound(find_objective(plan.objective_name), problem, plan, "max").value_L
    np.testing.assert_allclose(found, theirs, rtol=1e-6)


def test_a_bound_that_the_loads_do_not_give_is_noticed():
    problem = Problem.from_loads(generate_loads(layers=4, experts=32), Cluster.grid(2, 4), replicas=8)
    plan = solve(problem, solver="eplb-global")
    assert plan.certificate.bound_name == "copies"
    value = plan.to_json()
    value["certificate"]["bound"] += (plan.certificate.objective - plan.certificate.bound) / 2
    assert "the bound is" in " ".join(check_plan(Plan.from_json(value), made_from=problem))
