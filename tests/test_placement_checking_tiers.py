"""The checker of plans with tiers: it accepts what the solver makes, and notices every tampering with it."""

import copy

import numpy as np
import pytest

from placement import Plan
from placement.checking.check import check_plan
from placement.solving.cluster_tiers import solve_cluster_tiers
from tests.test_placement_tiers import cluster, problem

STEPS = {"batch": 4, "chunk": 16, "chunk_weight": 0.5}


@pytest.fixture(scope="module", params=[True, False])
def solved(request):
    asked = problem(cluster(nodes=2, gpus=2, slots=(2, 2, 9), overlap=request.param, **STEPS), layers=3, experts=8)
    return asked, solve_cluster_tiers(asked, solver="search", time_limit_s=0.4)


def drop_a_home(value, draw):
    map_LP = np.array(value["physical_to_logical_map"])
    layer, slot = map_LP_choice(map_LP >= 0, draw)
    value["physical_to_logical_map"][layer][slot] = -1


def map_LP_choice(wanted, draw):
    places = np.argwhere(wanted)
    return places[draw.integers(len(places))].tolist()


def double_a_home(value, draw):
    node = value["homes"][draw.integers(2)]
    layer = int(draw.integers(3))
    placed = [expert for expert in range(8) if expert not in node["ssd"][layer]]
    node["ssd"][layer].append(int(draw.choice(placed)))


def move_a_home(value, draw):
    """An expert changes its node below the GPUs: bytes or seconds change, or both."""
    for key in ("ssd", "ssd_streamed", "host", "host_streamed"):
        for layer in range(3):
            if len(value["homes"][0][key][layer]) > len(value["homes"][1][key][layer]):
                value["homes"][1][key][layer].append(value["homes"][0][key][layer].pop())
                return
    value["homes"][0]["host"][0] = [0, 1, 2, 3]


def claim_fewer_seconds(value, draw):
    value["certificate"]["objective"] *= 1 - 10.0 ** -draw.integers(1, 5)


def claim_a_better_bound(value, draw):
    certificate = value["certificate"]
    certificate["bound"] += (certificate["objective"] - certificate["bound"]) * draw.uniform(0.01, 1) + 1e-9


def claim_another_step(value, draw):
    steps = value["certificate"]["in_sample"]
    name = str(draw.choice(list(steps)))
    steps[name] *= 1 + draw.choice([-1, 1]) * 10.0 ** -draw.integers(1, 5)


def raise_a_multiplier(value, draw):
    chains = value["certificate"]["dual"]["chains"]
    rows = chains[str(draw.choice(list(chains)))]
    rows[0][int(draw.integers(3))] += draw.uniform(0.5, 2)


def change_a_price(value, draw):
    prices = value["certificate"]["dual"]["bytes"]
    name = str(draw.choice(["GPU 0", "GPU 1", "GPU 2", "GPU 3"]))
    prices[name] = prices[name] + draw.uniform(0.1, 1) * value["certificate"]["objective"] / 2e6


def break_the_multipliers(value, draw):
    value["certificate"]["dual"] = [{}, {"bytes": 3}, {"bytes": {}, "chains": {"gpu 0": "x"}}][draw.integers(3)]


def shrink_a_memory(value, draw):
    value["cluster"]["memory_bytes_G"][int(draw.integers(4))] = 0.9e6


def speed_a_device_up(value, draw):
    name = str(draw.choice(["cpu_bytes_per_s_M", "ssd_bytes_per_s_M", "dram_bytes_per_s_M", "nic_bytes_per_s_G"]))
    value["cluster"][name] = [rate * 3 for rate in value["cluster"][name]]


MUTATIONS = (
    *(drop_a_home, double_a_home, move_a_home, claim_fewer_seconds, claim_a_better_bound, claim_another_step),
    *(raise_a_multiplier, change_a_price, break_the_multipliers, shrink_a_memory, speed_a_device_up),
)


def faults_of(value, asked):
    """What the reader or the checker says of a tampered file."""
    try:
        return check_plan(Plan.from_json(value), made_from=asked)
    except ValueError as error:
        return [str(error)]


def test_what_the_solver_makes_passes(solved):
    asked, plan = solved
    assert check_plan(plan, made_from=asked) == []
    assert plan.certificate.bound_name == "relaxation"


@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda mutate: mutate.__name__)
def test_every_tampering_is_noticed(solved, mutate):
    asked, plan = solved
    before = plan.to_json()
    for seed in range(10):
        value = copy.deepcopy(before)
        mutate(value, np.random.default_rng(seed))
        if value != before:
            assert faults_of(value, asked), (mutate.__name__, seed)


@pytest.mark.parametrize(
    ("homes", "words"),
    [
        ("x", "list with one mapping per node"),
        ([{"host": [[0]]}, {}], "must list experts of 3 layers"),
        ([{"host": [[99], [], []]}, {}], "outside 0..7"),
        ([{"host": [[0.5], [], []]}, {}], "outside 0..7"),
        ([{}], r"homes must be \[layers, experts, nodes\]"),
    ],
)
def test_damaged_homes_are_refused(solved, homes, words):
    _, plan = solved
    with pytest.raises(ValueError, match=words):
        Plan.from_json({**plan.to_json(), "homes": homes})
