import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from placement import Cluster, Plan, Problem, solve
from placement.checking.check import check_plan
from placement.data.generators import generate_trace


@pytest.fixture
def make_trace():
    return partial(generate_trace, tokens=400, layers=3, experts=16, top_k=2, blocks=4, tokens_per_sequence=20)


def test_plan_file_round_trip_and_damage(make_trace, tmp_path):
    plan = solve(Problem.from_trace(make_trace(), Cluster.grid(2, 4)), solver="lpt")
    path = tmp_path / "plan.json"
    plan.save(path)
    assert Plan.load(path).to_json() == plan.to_json()
    value = json.loads(path.read_text())
    for key, bad, words in [
        ("version", 9, "version 9 is not supported"),
        ("physical_to_logical_map", [[0, 99] * 8] * 3, "slots must name experts"),
        ("layer_ids", [0, 1], "layer_ids"),
        ("cluster", {"node_G": [1]}, "cluster"),
        ("dispatch", "magic", "dispatch must be"),
    ]:
        path.write_text(json.dumps({**value, key: bad}))
        with pytest.raises(ValueError, match=words):
            Plan.load(path)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"plan\.json"):
        Plan.load(path)


def test_checker_sees_a_missing_expert_and_a_false_claim(make_trace):
    problem = Problem.from_trace(make_trace(), Cluster.grid(2, 4))
    plan = solve(problem, solver="contiguous")
    broken_LP = plan.physical_to_logical_LP.copy()
    broken_LP[0, 0] = broken_LP[0, 1]
    assert "have no copy" in check_plan(replace(plan, physical_to_logical_LP=broken_LP))[0]
    moved_LP = plan.physical_to_logical_LP.reshape(3, 8, 2).transpose(0, 2, 1).reshape(3, 16)
    assert "the certificate claims" in check_plan(replace(plan, physical_to_logical_LP=moved_LP), made_from=problem)[0]
    assert check_plan(plan, Problem.from_loads(np.ones((2, 16)), plan.cluster)) != []
