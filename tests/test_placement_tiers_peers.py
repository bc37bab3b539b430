"""GPUs that only lend memory: costs as written, plans equal to brute force, and every tampering noticed."""

import copy

import numpy as np
import pytest

from placement import Plan, Problem
from placement.checking.check import check_figures, check_plan
from placement.commands.tier_report import print_tiers
from placement.solving.cluster_tiers import solve_cluster_tiers
from placement.tiers.memories import memory_rows
from placement.tiers.model import tier_model
from routing.traces import RoutingTrace
from tests.test_placement_tiers import brute_force, cluster, problem


@pytest.mark.parametrize(
    ("peers", "overlap", "seconds"),
    [("nvlink", True, 0.002), ("nvlink", False, 0.004), ("pcie", True, 0.02), ("pcie", False, 0.022)],
)
def test_seconds_of_a_layer_computed_by_hand(peers, overlap, seconds):
    """1 MB at the GPU's 1 GB/s twice, and once over NVLink at 500 MB/s or PCIe at 50 MB/s; nothing goes to others."""
    trace = RoutingTrace(expert_TLK=np.array([[[0, 1]]] * 4, np.int16), sequence_T=np.zeros(4, np.int32))
    asked = Problem.from_trace(trace, cluster(gpus=2, slots=(1, 1, 1), overlap=overlap, peers=peers), replicas=0)
    model = tier_model(asked)
    names = [(way.place, way.index, way.streamed) for way in model.ways.ways]
    assert names[:2] == [("gpu", 0, False), ("gpu", 1, True)]
    assert model.seconds(np.array([[0, 1]])) == pytest.approx(seconds)


PEERS = [(0, 1, "nvlink"), (1, 2, "nvlink"), (2, 1, "pcie"), (3, 2, "pcie")]


@pytest.mark.parametrize(("seed", "nodes", "peers"), PEERS)
def test_plans_with_peers_equal_brute_force(seed, nodes, peers):
    draw = np.random.default_rng(seed)
    slots = tuple(int(n) for n in draw.integers(1, 3, size=2))
    experts = 4 if nodes == 1 else 2
    asked = problem(cluster(nodes, 2, (*slots, 99), batch=3, overlap=bool(seed % 2), peers=peers), experts=experts)
    best = brute_force(tier_model(asked))
    plan = solve_cluster_tiers(asked, solver="ilp", time_limit_s=10, seed=seed)
    assert plan.certificate.objective == pytest.approx(best, rel=1e-4)
    assert plan.certificate.bound <= best * (1 + 1e-9)
    assert check_plan(plan, made_from=asked) == []


@pytest.fixture(scope="module")
def solved():
    """Without overlap every expert's time counts, so that no two experts can be exchanged unnoticed."""
    asked = problem(cluster(1, 3, (4, 4, 99), peers="nvlink", overlap=False), layers=3, experts=9)
    return asked, solve_cluster_tiers(asked, solver="search", time_limit_s=0.3)


def test_peers_hold_what_the_first_gpu_does_not(solved, tmp_path, capsys):
    asked, plan = solved
    rows = {row["memory"]: row["experts"] for row in memory_rows(plan)}
    assert list(rows) == ["GPU 0", "peer GPU 1", "peer GPU 2", "host memory of node 0", "SSD of node 0"]
    assert rows["GPU 0"] == 4
    assert rows["peer GPU 1"] + rows["peer GPU 2"] > 0
    figures = {one.name: one.verdict for one in check_figures(plan, made_from=asked)}
    assert figures["fullest peer GPU"] == "holds"
    without = problem(cluster(1, 1, (4, 4, 99), overlap=False), layers=3, experts=9)
    alone = solve_cluster_tiers(without, solver="search", time_limit_s=0.3)
    assert plan.certificate.objective < alone.certificate.objective
    plan.save(tmp_path / "p.json")
    assert Plan.load(tmp_path / "p.json").cluster.tiers.peers == "nvlink"
    print_tiers(plan, tmp_path / "p.json", None)
    assert "on peer GPUs" in " ".join(capsys.readouterr().out.split())


def exchange_gpus(value, draw):
    """An expert of the GPU that computes and one of a peer change places."""
    row = value["physical_to_logical_map"][int(draw.integers(3))]
    size = value["slots_per_gpu"]
    held = [slot for slot, expert in enumerate(row) if expert >= 0]
    own, lent = [slot for slot in held if slot < size], [slot for slot in held if slot >= size]
    if own and lent:
        one, other = int(draw.choice(own)), int(draw.choice(lent))
        row[one], row[other] = row[other], row[one]


def speed_the_link_up(value, draw):
    value["cluster"]["nvlink_bytes_per_s_G"] = [rate * 2 for rate in value["cluster"]["nvlink_bytes_per_s_G"]]


def let_all_gpus_compute(value, draw):
    value["cluster"]["tiers"]["peers"] = None


def copy_over_pcie(value, draw):
    value["cluster"]["tiers"]["peers"] = "pcie"


@pytest.mark.parametrize("mutate", [exchange_gpus, speed_the_link_up, let_all_gpus_compute, copy_over_pcie])
def test_every_tampering_is_noticed(solved, mutate):
    asked, plan = solved
    before = plan.to_json()
    for seed in range(5):
        value = copy.deepcopy(before)
        mutate(value, np.random.default_rng(seed))
        if value != before:
            assert check_plan(Plan.from_json(value), made_from=asked), (mutate.__name__, seed)
