import json
from dataclasses import replace

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from experiments import cli
from placement import Cluster, Plan, Problem, solve
from placement.formats import FORMATS, export_plan
from placement.formats.counts import whole_counts
from placement.formats.importing import import_plan
from placement.formats.lplb import read_lplb


@pytest.fixture(params=[0, 8], ids=["no replicas", "8 replicas"])
def plan(request):
    load = np.random.default_rng(0).lognormal(0, 1, (6, 16))
    load[:2] = 0
    return solve(Problem.from_loads(load, Cluster.grid(2, 4), replicas=request.param), solver="lplb")


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


@pytest.mark.parametrize("name", list(FORMATS))
def test_draft_layers_follow_the_decoder_in_the_initial_layout(plan, name, tmp_path):
    """Layers 6 and 7 behind a decoder of 6; no load is known of them."""
    path = tmp_path / "x"
    if name == "lplb":
        with pytest.raises(ValueError, match="a Planner that is told nothing"):
            export_plan(plan, name, path, extra_layers=2)
        return
    export_plan(plan, name, path, extra_layers=2)
    initial = [slot % 16 for slot in range(plan.num_slots)]
    if name == "sglang":
        table = json.loads(path.read_text())["physical_to_logical_map"]
        assert (len(table), table[6:]) == (8, [initial, initial])
        assert table[2:6] == plan.physical_to_logical_LP.tolist()
    elif name == "tensorrt-llm":
        assignments = yaml.safe_load(path.read_text())["initial_global_assignments"]
        assert list(assignments) == [2, 3, 4, 5, 6, 7]
        assert assignments[7] == initial
    elif name in ("vllm", "vllm-ascend"):
        value = json.loads(path.read_text())
        assert len(value.get("initial_global_assignments", value.get("layer_list"))) == 6
    elif name == "omni":
        assert np.load(path, allow_pickle=False).shape == (8, 6, 16)
    elif name == "hygon":
        assert json.loads(path.read_text())["physical_to_logical_map"][4:] == [initial, initial]
    else:
        count = np.array(json.loads(path.read_text())["logical_count"])
        assert (count.shape, np.ptp(count[6:])) == ((8, 16), 0)


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "lplb"])
def test_experts_that_do_not_divide_over_the_gpus(name, tmp_path):
    """10 experts on 4 GPUs: refused with the number of replicas that helps, and exported with it."""
    load = np.random.default_rng(1).lognormal(0, 1, (3, 10))
    with pytest.raises(ValueError, match="use --replicas 2"):
        Problem.from_loads(load, Cluster.grid(1, 4))
    plan = solve(Problem.from_loads(load, Cluster.grid(1, 4), replicas=2), solver="search", time_limit_s=1)
    export_plan(plan, name, tmp_path / "x", extra_layers=1)
    FORMATS[name].validate(tmp_path / "x", None)


def test_extra_layers_are_not_negative(plan, tmp_path):
    with pytest.raises(ValueError, match="0 or more"):
        export_plan(plan, "sglang", tmp_path / "x", extra_layers=-1)


@pytest.mark.parametrize("name", ["sglang-count", "ktransformers"])
@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-9, 1e-300, 1e12])
def test_shares_survive_as_counts(name, scale, tmp_path):
    share = np.random.default_rng(0).dirichlet(np.ones(256), 2) * scale
    share[0, 7] = 0
    problem = Problem.from_loads(share, Cluster.grid(1, 8))
    export_plan(solve(problem, solver="lpt"), name, tmp_path / "x")
    count = np.array(json.loads((tmp_path / "x").read_text())["logical_count"])
    assert len(set(count[0])) == 256
    assert (np.argsort(count[1]) == np.argsort(share[1])).all()
    np.testing.assert_allclose(count / count.max(), share / share.max(), atol=1e-9)
    assert ((count > 0) == (share > 0)).all()
    assert (count == np.rint(count)).all()


@given(hnp.arrays(np.float64, (2, 5), elements=st.floats(0, 1e300)))
@settings(deadline=None)
def test_counts_keep_order_and_zeros(load_LE):
    count_LE = whole_counts(load_LE)
    assert ((count_LE > 0) == (load_LE > 0)).all()
    assert (np.diff(count_LE.ravel()[np.argsort(load_LE.ravel(), kind="stable")]) >= 0).all()
    assert np.isfinite(count_LE).all()


def test_counts_of_tokens_stay_what_they_are():
    tokens = np.array([[3.0, 0.0, 12.0]])
    assert whole_counts(tokens) is tokens
    with pytest.raises(ValueError, match="finite"):
        whole_counts(np.array([[np.nan]]))


@pytest.mark.parametrize("name", list(FORMATS))
def test_each_export_says_the_flag_and_the_version(plan, name, tmp_path):
    usage = export_plan(plan, name, tmp_path / "experts.out")
    assert str(tmp_path / "experts.out") in usage
    assert "checked with" in usage
    assert "{" not in usage or name in ("tensorrt-llm", "vllm-ascend", "vllm", "hygon")
    assert ("pull request 41141; no release" in usage) == (name == "vllm")
    if name.startswith("sglang"):
        assert f"--ep-num-redundant-experts {plan.num_slots - 16}" in usage


def test_the_command_prints_how_to_use_the_file(plan, tmp_path, monkeypatch, capsys):
    plan.save(tmp_path / "p.json")
    out = str(tmp_path / "e.json")
    command = ["place", "export", str(tmp_path / "p.json"), "--format", "vllm", "--out", out, "--extra-layers", "1"]
    monkeypatch.setattr("sys.argv", ["expertier", *command])
    with pytest.raises(SystemExit) as finished:
        cli.main()
    assert not finished.value.code
    assert f'"initial_mapping_path": "{out}"' in capsys.readouterr().out
    assert len(json.loads((tmp_path / "e.json").read_text())["initial_global_assignments"]) == 5


def test_a_changed_ranking_is_noticed(plan, tmp_path):
    export_plan(plan, "ktransformers", tmp_path / "x")
    value = json.loads((tmp_path / "x").read_text())
    value["logical_count"][3].reverse()
    (tmp_path / "x").write_text(json.dumps(value))
    with pytest.raises(ValueError, match="row 3 ranks experts otherwise"):
        FORMATS["ktransformers"].validate(tmp_path / "x", plan)


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
    with pytest.raises(ValueError, match="unknown format 'magic'; there are hygon, ktransformers, lplb, omni, sglang"):
        export_plan(plan, "magic", tmp_path / "x")


def planner_map(r2o, own):
    """What lplb.Planner makes of a topology and the experts of each GPU, which come first; blocks of copies behind."""
    source = np.array(r2o)
    copies = np.concatenate([own[source, np.arange(source.shape[1]) + block] for block in range(0, 4, 2)], axis=1)
    return np.concatenate([own, copies], axis=1).ravel().tolist()


def test_lplb_maps_are_what_its_planner_makes(tmp_path):
    """Any layer of experts with one or two copies, as many on each GPU, becomes originals and copies of a topology."""
    draw = np.random.default_rng(3)
    map_LP = np.zeros((5, 8, 6), np.int64)
    map_LP[:, :, :3] = draw.permuted(np.tile(np.arange(24), (5, 1)), axis=1).reshape(5, 8, 3)
    for layer, column in np.ndindex(5, 3):  # along a circle of GPUs in random order
        circle = draw.permutation(8)
        map_LP[layer, circle, 3 + column] = map_LP[layer, np.roll(circle, 1), column]
    plan = replace(
        solve(Problem.from_loads(np.ones((5, 24)), Cluster.grid(1, 8), replicas=24), solver="lplb"),
        physical_to_logical_LP=map_LP.reshape(5, 48),
    )
    export_plan(plan, "lplb", tmp_path / "x")
    value = json.loads((tmp_path / "x").read_text())
    for layer, one in enumerate(value["layers"]):
        source, slots = np.array(one["redundant_to_original"]), np.array(one["phy2log"]).reshape(8, 6)
        assert (np.sort(source, axis=0) == np.arange(8)[:, None]).all()
        assert (slots[:, 3:] == slots[source, np.arange(3)]).all()
        assert [sorted(row) for row in slots.tolist()] == [sorted(row) for row in map_LP[layer].tolist()]
    rows, gpus = read_lplb(tmp_path / "x")
    assert (len(rows), gpus) == (5, 8)


def test_lplb_maps_of_planners_are_read(tmp_path):
    """Two groups of four GPUs, blocks of two copies, as a planner combines them; then every kind of damage."""
    r2o = [[1, 2], [2, 3], [3, 0], [0, 1]]
    own = np.arange(40).reshape(2, 4, 5)
    row = [*planner_map(r2o, own[0]), *planner_map(r2o, own[1])]
    good = {"format": "lplb_replica_map", "version": 1, "ep_size": 8, "n_routed_experts": 72,
            "n_logical_routed_experts": 40, "layers": [{"redundant_to_original": r2o, "phy2log": row}]}  # fmt: skip
    path, out = tmp_path / "x.json", tmp_path / "p.json"
    path.write_text(json.dumps(good))
    assert read_lplb(path) == ([row], 8)
    plan = import_plan(path, "lplb", Cluster.grid(2, 4))
    assert (plan.dispatch, plan.num_experts, plan.slots_per_gpu) == ("quota", 40, 9)
    plan.save(out)
    assert Plan.load(out).physical_to_logical_LP.tolist() == [row]
    layer = good["layers"][0]
    for change, words in (
        ({"version": 2}, "expected version 1"),
        ({"ep_size": 1 << 20}, "must be positive whole numbers"),
        ({"ep_size": 7}, "do not divide over 7 GPUs"),
        ({"layers": []}, "one mapping per layer"),
        ({"layers": [{**layer, "phy2log": row[::-1]}]}, "the copies on GPU 0 are not those"),
        ({"layers": [{**layer, "redundant_to_original": [[1, 2], [2, 3], [3, 0], [0, 0]]}]}, "every GPU of the group"),
        ({"layers": [{**layer, "redundant_to_original": [[0, 2], [2, 3], [3, 0], [1, 1]]}]}, "none as its own source"),
        ({"layers": [{**layer, "redundant_to_original": [[1, 2], [2, 0], [0, 1]]}]}, "must be multiples of that"),
        ({"layers": [{**layer, "redundant_to_original": [[-1]]}]}, "integers >= 0"),
    ):
        path.write_text(json.dumps({**good, **change}))
        with pytest.raises(ValueError, match=words):
            read_lplb(path)
    path.write_text(json.dumps(good))
    with pytest.raises(ValueError, match="for 8 GPUs does not fit the 4 GPUs"):
        import_plan(path, "lplb", Cluster.grid(1, 4))


def test_what_lplb_cannot_say_is_refused(tmp_path):
    load = np.array([[9.0, 1, 1, 1, 1, 1, 1, 1]])
    problem = Problem.from_loads(load, Cluster.grid(1, 4), replicas=4)
    with pytest.raises(ValueError, match="plan with `--solver lplb`"):
        export_plan(solve(problem, solver="eplb"), "lplb", tmp_path / "x")
    with pytest.raises(ValueError, match="at most 2 copies on each"):
        solve(Problem.from_loads(load, Cluster.grid(1, 4), replicas=12), solver="lplb")
    assert not list(tmp_path.iterdir())


def test_hygon_maps_are_read_as_the_plugin_reads_them(plan, tmp_path):
    """Version 2 holds several models, of which one is the plan's; sizes that do not fit the map are refused."""
    path = tmp_path / "map.json"
    export_plan(plan, "hygon", path)
    written = json.loads(path.read_text())
    assert (written["num_physical_experts"], written["num_logical_experts"]) == (plan.num_slots, 16)
    draft = {"physical_to_logical_map": [[0, 1, 1, 0]]}
    by_model = {"version": 2, "format": "vllm_offline_eplb_physical_to_logical_by_model"}
    path.write_text(json.dumps({**by_model, "model_maps": {"Model": written, "Draft": draft}}))
    FORMATS["hygon"].validate(path, plan)
    for value, words in (
        ({**by_model, "model_maps": {"Draft": draft}}, "not what the plan says"),
        ({**written, "num_redundant_experts": 99}, "num_redundant_experts is 99"),
        ({**written, "version": 3}, "expected version 1"),
        ({**written, "physical_to_logical_map": [[0, 2]]}, "every expert"),
    ):
        path.write_text(json.dumps(value))
        with pytest.raises(ValueError, match=words):
            FORMATS["hygon"].validate(path, plan)
