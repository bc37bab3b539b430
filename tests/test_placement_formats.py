import json
from dataclasses import replace

import numpy as np
import pytest
import yaml

from placement import Cluster, Problem, solve
from placement.formats import FORMATS, export_plan


@pytest.fixture(params=[0, 8], ids=["no replicas", "8 replicas"])
def plan(request):
    load = np.random.default_rng(0).lognormal(0, 1, (6, 16))
    load[:2] = 0
    return solve(Problem.from_loads(load, Cluster.grid(2, 4), replicas=request.param), solver="lpt")


@pytest.mark.parametrize("name", list(FORMATS))
def test_every_format_is_written_and_read_back(plan, name, tmp_path):
    path = tmp_path / "experts.out"
    export_plan(plan, name, path)
    FORMATS[name].validate(path, None)
    other = replace(plan, physical_to_logical_LP=np.roll(plan.physical_to_logical_LP, 1, axis=1))
    if name not in ("ktransformers", "sglang-count"):
        with pytest.raises(ValueError, match="plan"):
            FORMATS[name].validate(path, other)
    assert [file.name for file in tmp_path.iterdir()] == ["experts.out"]


def test_layer_conventions(plan, tmp_path):
    rows = plan.physical_to_logical_LP.tolist()
    path = tmp_path / "x"
    export_plan(plan, "sglang", path)
    table = json.loads(path.read_text())["physical_to_logical_map"]
    assert len(table) == 6
    assert table[2:] == rows
    export_plan(plan, "tensorrt-llm", path)
    value = yaml.safe_load(path.read_text())
    assert list(value) == ["num_slots", "initial_global_assignments", "layer_updates_per_iter"]
    assert value["initial_global_assignments"] == {2 + i: row for i, row in enumerate(rows)}
    export_plan(plan, "vllm", path)
    assert json.loads(path.read_text())["initial_global_assignments"] == {str(i): row for i, row in enumerate(rows)}
    assert len(path.read_text().splitlines()) == 1
    export_plan(plan, "vllm-ascend", path)
    value = json.loads(path.read_text())
    assert value["moe_layer_count"] == 4
    assert [device["device_expert"] for device in value["layer_list"][1]["device_list"]] == np.reshape(
        rows[1], (8, -1)
    ).tolist()
    export_plan(plan, "omni", path)
    array = np.load(path, allow_pickle=False)
    assert array.shape == (8, 4, 16)
    assert (array.sum(axis=(0, 2)) == plan.num_slots).all()
    export_plan(plan, "ktransformers", path)
    count = np.array(json.loads(path.read_text())["logical_count"])
    assert count.shape == (6, 16)
    assert not count[:2].any()


def test_doubled_copies_are_refused_where_the_engine_refuses_them(tmp_path):
    plan = solve(Problem.from_loads(np.ones((1, 4)), Cluster.grid(1, 4), replicas=4), solver="lpt")
    doubled = replace(plan, physical_to_logical_LP=np.array([[0, 0, 1, 1, 2, 2, 3, 3]]))
    for name in ("vllm-ascend", "omni"):
        with pytest.raises(ValueError, match="second copy"):
            export_plan(doubled, name, tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_vllm_one_map_only_where_layers_agree(tmp_path):
    problem = Problem.from_loads(np.ones((2, 8)), Cluster.grid(1, 4))
    path = tmp_path / "e.placement.json"
    export_plan(solve(problem, solver="contiguous"), "vllm", path)
    assert json.loads(path.read_text()) == {"expert_to_ep_rank": [0, 0, 1, 1, 2, 2, 3, 3]}
    with pytest.raises(ValueError, match="one map for all layers"):
        export_plan(solve(problem, solver="random"), "vllm", path)


def test_unknown_format_lists_the_known_ones(plan, tmp_path):
    with pytest.raises(ValueError, match="unknown format 'magic'; there are ktransformers, omni, sglang"):
        export_plan(plan, "magic", tmp_path / "x")
