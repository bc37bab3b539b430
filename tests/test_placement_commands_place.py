import json
from functools import partial

import pytest
import torch

from placement.data.generators import generate_trace

CLUSTER = """
model: {experts: 16}
node_types: {n: {gpus: {count: 4}}}
nodes: [{type: n, count: 2}]
ep: {size: 8}
"""
KEYS = {"objective", "bound", "gap", "balancedness", "gpu_fanout", "node_fanout", "seconds"}


@pytest.fixture
def make_trace():
    return partial(generate_trace, tokens=400, layers=3, experts=16, top_k=2, blocks=4, tokens_per_sequence=20)


@pytest.fixture
def files(make_trace, tmp_path):
    make_trace().save(tmp_path / "t.npz")
    (tmp_path / "c.yaml").write_text(CLUSTER)
    return tmp_path


def test_from_trace_to_sglang(files, run):
    plan, report, out = files / "plan.json", files / "r.json", files / "sglang.json"
    assert run("place", "solve", "--trace", files / "t.npz", "--cluster", files / "c.yaml", "--rows", "0:300",
               "--replicas", 8, "--out", plan, "--json", report, "--time-limit", 1) == 0  # fmt: skip
    assert json.loads(report.read_text()).keys() >= KEYS
    assert run("place", "score", plan, "--trace", files / "t.npz", "--rows", "300:", "--json", report) == 0
    assert json.loads(report.read_text()).keys() >= KEYS
    assert run("place", "export", plan, "--format", "sglang", "--out", out) == 0
    exported = json.loads(out.read_text())
    assert list(exported) == ["physical_to_logical_map"]
    assert exported["physical_to_logical_map"] == json.loads(plan.read_text())["physical_to_logical_map"]


def test_bad_input_is_one_line_and_exit_2(files, run, capfd):
    (files / "c.yaml").write_text(CLUSTER.replace("ep: {size: 8}", "ep: {slotz: 8}"))
    assert (
        run("place", "solve", "--trace", files / "t.npz", "--cluster", files / "c.yaml", "--out", files / "p.json") == 2
    )
    said = capfd.readouterr().err
    assert "ep.slotz: unknown key" in said
    assert len(said.strip().splitlines()) == 1
    assert not (files / "p.json").exists()


@pytest.mark.slow
def test_holdout_current_and_migrate(files, run, capfd):
    (files / "c.yaml").write_text(CLUSTER.replace("experts: 16", "experts: 16, expert_bytes: 1e6"))
    common = ("--trace", files / "t.npz", "--cluster", files / "c.yaml", "--time-limit", 1, "--json", files / "r.json")
    assert run("place", "solve", *common, "--holdout", 0.3, "--out", files / "a.json") == 0
    held = json.loads(files.joinpath("r.json").read_text())["out_of_sample"]["held-out sequences"]
    assert 0 < held["balancedness"] <= 1
    assert run("place", "solve", *common, "--objective", "fanout+balance", "--current", files / "a.json",
               "--churn-weight", 10, "--out", files / "b.json") == 0  # fmt: skip
    report = json.loads(files.joinpath("r.json").read_text())
    assert report["churn"]["moved_bytes"] == report["churn"]["moved_copies"] * 1e6
    assert run("place", "solve", *common, "--solver", "round-robin", "--out", files / "c.json") == 0
    assert run("place", "migrate", files / "a.json", files / "c.json", "--out", files / "steps.json",
               "--plan-out", files / "d.json") == 0  # fmt: skip
    steps = json.loads((files / "steps.json").read_text())
    assert sum(step["kind"] == "transfer" for step in steps["steps"]) * 1e6 == steps["moved_bytes"]
    assert run("place", "solve", *common, "--churn-weight", 1, "--out", files / "b.json") == 2
    assert "--current" in capfd.readouterr().err


def test_tiers_loads_and_cluster(files, run):
    (files / "hw.toml").write_text(
        "disk_bytes_per_s = 3e9\ncached_bytes_per_s = 1e10\nmemory_bytes_per_s = 5e10\n"
        "exact_bytes_per_s = 2e10\nfast_bytes_per_s = 3e10\nlayer_s = 1e-4\n"
    )
    counts = files / "counts.pt"
    torch.save({"logical_count": torch.tensor([[1, 2, 3, 4], [4, 3, 2, 1]])}, counts)
    assert run("place", "loads", counts, "--format", "sglang", "--out", files / "loads.json") == 0
    assert json.loads((files / "loads.json").read_text())["logical_count"] == [[1, 2, 3, 4], [4, 3, 2, 1]]
    topology = files / "topo.txt"
    topology.write_text("\tGPU0\tGPU1\tCPU Affinity\nGPU0\t X \tNV4\t0-7\nGPU1\tNV4\t X \t0-7\n")
    assert run("place", "cluster", topology, "--nodes", 3, "--out", files / "made.yaml") == 0
    assert run("place", "solve", "--loads", files / "loads.json", "--cluster", files / "made.yaml", "--replicas", 2,
               "--out", files / "p.json") == 0  # fmt: skip
    assert json.loads((files / "p.json").read_text())["num_gpus"] == 6
    assert run("place", "tiers", "--loads", files / "loads.json", "--hardware", files / "hw.toml", "--expert-size",
               "1MB", "--cpu-memory", "4MB", "--out", files / "tiers.json") == 0  # fmt: skip
    tiers = json.loads((files / "tiers.json").read_text())["tier"]
    assert tiers == [[2, 2, 1, 1], [1, 1, 2, 2]]
