"""Bounds of integer programmes: the checker proves them by its own search, refutes false ones, says what it trusts."""

import copy
import itertools
from dataclasses import replace

import numpy as np
import pytest

from placement import Cluster, Plan, Problem, generate_trace, solve
from placement.checking import layer_search, tier_bounds
from placement.checking.check import check_figures
from placement.solving.cluster_tiers import solve_cluster_tiers
from tests.test_placement_tiers import brute_force, cluster, problem, tier_model

CASES = {"fan-out": (1, 2, 0, 6, "fanout"), "copies": (1, 2, 2, 8, "balance"), "balance": (1, 3, 0, 9, "balance")}


@pytest.fixture(scope="module")
def solved():
    found = {}
    for name, (nodes, gpus, copies, experts, objective) in CASES.items():
        trace = generate_trace(tokens=300, layers=2, experts=experts, top_k=3, blocks=4, tokens_per_sequence=20)
        asked = Problem.from_trace(trace, Cluster.grid(nodes, gpus), replicas=copies)
        found[name] = asked, solve(asked, objective=objective, solver="ilp", time_limit_s=2, processes=1)
    asked = problem(cluster(1, 2, (1, 3, 99), batch=4), experts=3, seed=2)
    found["tiers"] = asked, solve_cluster_tiers(asked, solver="ilp", time_limit_s=5)
    return found


def figure(name, plan, asked):
    return {one.name: one for one in check_figures(plan, made_from=asked)}[name]


@pytest.mark.parametrize("name", [*CASES, "tiers"])
def test_bounds_of_programmes_are_proved_again(solved, name):
    asked, plan = solved[name]
    certificate = plan.certificate
    assert "MIP dual" in certificate.bound_name
    assert certificate.data_bound < certificate.bound * (1 - 1e-4)
    found = figure("bound", plan, asked)
    assert (found.verdict, found.derived) == ("holds", certificate.bound)
    alone = "bound by multipliers alone" if name == "tiers" else "bound by the data alone"
    assert figure(alone, plan, asked).verdict == "holds"


@pytest.mark.parametrize("name", [*CASES, "tiers"])
def test_a_search_that_ends_early_says_what_rests_on_the_solver(solved, name, monkeypatch):
    asked, plan = solved[name]
    monkeypatch.setattr(layer_search, "MOST_STEPS", 3)
    monkeypatch.setattr(tier_bounds, "WIDTHS", (1, 1))
    found = figure("bound", plan, asked)
    assert found.verdict == "holds in part"
    assert plan.certificate.data_bound * (1 - 1e-6) <= found.derived < plan.certificate.bound
    assert "rest on the solver of the integer programme" in found.open
    assert "without the solver's word" in plan.certificate.bound_basis


def swapped(value, draw):
    """Two GPUs exchange experts in a layer: mostly a worse plan."""
    row = value["physical_to_logical_map"][int(draw.integers(2))]
    one, other = int(draw.integers(value["slots_per_gpu"])), -1 - int(draw.integers(value["slots_per_gpu"]))
    row[one], row[other] = row[other], row[one]


def claim_optimality(value, draw):
    """A worse plan whose figures are right, and which is said to be optimal by an integer programme."""
    swapped(value, draw)
    return True


def claim_more_of_the_data(value, draw):
    certificate = value["certificate"]
    certificate["data_bound"] += (certificate["bound"] - certificate["data_bound"]) * draw.uniform(0.1, 1)
    return False


def claim_less_of_the_data(value, draw):
    value["certificate"]["data_bound"] *= 1 - 10.0 ** -draw.integers(1, 4)
    return False


def name_another_bound(value, draw):
    """What a programme proved is said to follow from the data."""
    value["certificate"]["bound_name"] = str(draw.choice(["pairs", "cardinality", "relaxation", "fluid"]))
    return False


MUTATIONS = (claim_optimality, claim_more_of_the_data, claim_less_of_the_data, name_another_bound)


@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda mutate: mutate.__name__)
@pytest.mark.parametrize("name", ["fan-out", *(pytest.param(n, marks=pytest.mark.slow) for n in ("copies", "balance"))])
def test_every_tampering_is_noticed(solved, name, mutate):
    asked, plan = solved[name]
    for seed in range(6):
        value = copy.deepcopy(plan.to_json())
        if mutate(value, np.random.default_rng(seed)):
            worse = Plan.from_json(value)
            claims = {one.name: one.derived for one in check_figures(worse, made_from=asked, derives_bounds=False)}
            seconds = claims[f"objective {plan.objective_name}"]
            if seconds <= plan.certificate.objective * (1 + 1e-6):
                continue
            in_sample = {key: claims[key] for key in plan.certificate.in_sample}
            value["certificate"] |= {"objective": seconds, "bound": seconds, "in_sample": in_sample, "gap_L": [0.0] * 2}
        faults = [fault for one in check_figures(Plan.from_json(value), made_from=asked) for fault in one.faults]
        assert faults, (mutate.__name__, seed)
        assert mutate is not claim_optimality or "lies below the claimed bound" in " ".join(faults)


def test_a_false_optimum_of_tiers_is_refuted(solved):
    asked, plan = solved["tiers"]
    draw, worse = np.random.default_rng(0), 0
    for _ in range(12):
        value = copy.deepcopy(plan.to_json())
        layer = int(draw.integers(2))
        node = value["homes"][0]
        kinds = [key for key in ("host", "host_streamed", "ssd", "ssd_streamed") if node[key][layer]]
        source = str(draw.choice(kinds))
        target = str(draw.choice([key for key in ("ssd", "ssd_streamed") if key != source]))
        moved = node[source][layer].pop()
        node[target][layer].append(moved)
        value["tier"][layer][moved] = 2
        claims = {one.name: one.derived for one in check_figures(Plan.from_json(value), made_from=asked)}
        seconds = claims["seconds"]
        if seconds <= plan.certificate.objective * (1 + 1e-6):
            continue
        steps = {key: claims[f"a step of {key}"] for key in plan.certificate.in_sample}
        value["metadata"]["seconds_per_step"] = steps
        value["certificate"] |= {"objective": seconds, "bound": seconds, "in_sample": steps}
        found = figure("bound", Plan.from_json(value), asked)
        assert "lies below the bound" in " ".join(found.faults)
        worse += 1
    assert worse > 3


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_the_search_of_a_layer_equals_brute_force(seed):
    """Two nodes of two GPUs of other speeds, GPUs and nodes priced apart: every division is tried."""
    draw = np.random.default_rng(seed)
    trace = generate_trace(tokens=60, layers=1, experts=8, top_k=3, blocks=2, seed=seed)
    machines = replace(Cluster.grid(2, 2), speed_G=np.array([1.0, 1.0, *draw.uniform(0.5, 1.5, 2)]))
    asked = Problem.from_trace(trace, machines)
    plan = solve(asked, solver="contiguous")
    search = layer_search._layer(plan, asked, 0, (1.0, float(draw.random()), float(draw.random())))
    best = min(valued(search, gpu_E) for gpu_E in divisions(range(8), 4))
    value, is_plan, _ = search.least(np.inf, 100_000)
    assert is_plan
    assert value == pytest.approx(best, rel=1e-12)


def divisions(free, gpus):
    """GPU of each of so many experts, two on each."""
    if gpus == 0:
        yield np.zeros(8, int)
    for pair in itertools.combinations(free, 2) if gpus else ():
        for gpu_E in divisions([e for e in free if e not in pair], gpus - 1):
            gpu_E[list(pair)] = gpus - 1
            yield gpu_E


def valued(search, gpu_E):
    """The objective of one division, expert by expert and set by set."""
    load_G = np.bincount(gpu_E, weights=search.load_WE[0], minlength=4)
    total = search.level * float((load_G * search.factor_G).max())
    for part in search.parts:
        of_E = part.of_GQ.argmax(axis=1)[gpu_E]
        touched = [len({of_E[e] for e in np.flatnonzero(row)}) for row in part.member_BE]
        total += part.weight * float(part.share_B @ touched)
    return total


@pytest.mark.parametrize("seed", range(4))
def test_the_search_of_tiers_equals_brute_force(seed):
    """A claim just below the optimum is proved, one just above it is refuted."""
    draw = np.random.default_rng(seed)
    slots = tuple(int(n) for n in draw.integers(1, 4, size=2))
    asked = problem(cluster(1, 2, (*slots, 99), batch=4, overlap=bool(seed % 2)), experts=3, seed=seed)
    best = brute_force(tier_model(asked))
    plan = solve_cluster_tiers(asked, solver="search", time_limit_s=0.1)
    steps = list(tier_bounds_steps(plan, asked))
    tables = tier_bounds._tables(plan, steps, plan.certificate.dual)
    priced = tier_bounds._priced_rooms(tables[0])
    proved, below = tier_bounds._searched(tables, priced, best)
    assert (proved, below) == (best, None)
    _, below = tier_bounds._searched(tables, priced, best * 1.01)
    assert below == pytest.approx(best, rel=1e-9)


def tier_bounds_steps(plan, asked):
    from placement.checking.costs import steps_of

    return steps_of(plan, asked)
