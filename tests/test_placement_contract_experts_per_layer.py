"""Models whose layers have different numbers of experts: loads, plans on GPUs, tiers, and a runtime that reads them."""

import json

import numpy as np
import pytest

from offload.cache.starting import read_starting_plan
from placement import SOLVERS, Cluster, Plan, Problem, evaluate, solve
from placement.checking.check import check_plan, doubled_copies
from placement.contract.parts import node_part
from placement.data.loads import read_load_file
from placement.objectives import find_objective
from placement.solving.cluster_tiers import solve_cluster_tiers
from tests.test_placement_tiers import cluster

ROWS = [[5.0, 3.0, 2.0, 1.0, 4.0, 1.0, 1.0, 2.0], [9.0, 1.0, 2.0, 3.0], [2.0, 2.0, 7.0, 1.0, 1.0, 3.0]]
COUNTS = (8, 4, 6)


@pytest.fixture
def loads(tmp_path):
    path = tmp_path / "loads.json"
    path.write_text(json.dumps({"logical_count": ROWS}))
    return read_load_file(path)


def asked(loads, machines, replicas=0):
    return Problem.from_loads(loads.load_LE, machines, replicas=replicas, experts_per_row=loads.experts_per_row)


def test_shorter_rows_are_layers_with_fewer_experts(loads):
    assert loads.experts_per_row == COUNTS
    assert loads.load_LE.shape == (3, 8)
    assert asked(loads, Cluster.grid(1, 4)).experts_L.tolist() == list(COUNTS)
    with pytest.raises(ValueError, match="has load on experts beyond its 3"):
        Problem.from_loads(loads.load_LE, Cluster.grid(1, 4), experts_per_row=(8, 3, 6))


@pytest.mark.parametrize("replicas", [0, 4])
@pytest.mark.parametrize("solver", [name for name in SOLVERS if name not in ("moetuner", "exflow", "fill")])
def test_every_solver_fills_the_slots_with_experts_that_there_are(loads, solver, replicas, tmp_path):
    problem = asked(loads, Cluster.grid(1, 4), replicas)
    plan = solve(problem, solver=solver, time_limit_s=0.3, processes=1)
    assert check_plan(plan, made_from=problem) == []
    for row, count in zip(plan.physical_to_logical_LP.tolist(), COUNTS, strict=True):
        assert set(row) == set(range(count))
    assert plan.certificate.bound <= evaluate(find_objective("balance"), plan, problem) + 1e-9
    if solver in ("search", "auto", "lpt"):
        assert doubled_copies(plan) == 0
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json").experts_per_layer == COUNTS


def test_tiers_of_such_a_model_start_a_runtime(loads, tmp_path):
    plan = solve_cluster_tiers(asked(loads, cluster(slots=(4, 6, 20), batch=2)), time_limit_s=5)
    assert plan.copies_LEG.sum() + (plan.homes.host_LEM > 0).sum() + (plan.homes.ssd_LEM > 0).sum() == sum(COUNTS)
    plan.save(tmp_path / "plan.json")
    found = read_starting_plan(tmp_path / "plan.json", COUNTS)
    assert [len(experts) for experts in found.experts_L] == [
        int((plan.tier_LE[layer, :count] < 2).sum()) for layer, count in enumerate(COUNTS)
    ]
    with pytest.raises(ValueError, match="do not fit the model's"):
        read_starting_plan(tmp_path / "plan.json", (8, 8, 8))


def test_a_plan_of_two_nodes_gives_each_its_part(loads, tmp_path):
    machines = cluster(nodes=2, gpus=2, slots=(1, 2, 20), batch=2)
    plan = solve_cluster_tiers(asked(loads, machines), time_limit_s=1)
    plan.save(tmp_path / "plan.json")
    with pytest.raises(ValueError, match="it is of 2 nodes; say which one this machine is"):
        read_starting_plan(tmp_path / "plan.json", COUNTS)
    held = np.zeros((3, 8), int)
    for node in range(2):
        part = node_part(plan, node)
        assert check_plan(part) == []
        part.save(tmp_path / "part.json")
        found = read_starting_plan(tmp_path / "part.json", COUNTS)
        in_memory = (plan.copies_LEG[:, :, 2 * node : 2 * node + 2].any(axis=2)) | (plan.homes.host_LEM[:, :, node] > 0)
        assert [set(experts) for experts in found.experts_L] == [set(np.flatnonzero(row)) for row in in_memory]
        assert read_starting_plan(tmp_path / "plan.json", COUNTS, node=node) == found
        held += in_memory
    assert held.max() <= 1
    with pytest.raises(ValueError, match=r"outside 0\.\.1"):
        node_part(plan, 2)
