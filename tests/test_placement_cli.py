import json
import subprocess
import sys
from functools import partial

import pytest

from placement.generators import generate_trace

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


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "experiments.cli", *map(str, arguments)], capture_output=True, text=True, check=False
    )


@pytest.fixture
def files(make_trace, tmp_path):
    make_trace().save(tmp_path / "t.npz")
    (tmp_path / "c.yaml").write_text(CLUSTER)
    return tmp_path


def test_from_trace_to_sglang(files):
    plan, report, out = files / "plan.json", files / "r.json", files / "sglang.json"
    done = run("place", "solve", "--trace", files / "t.npz", "--cluster", files / "c.yaml", "--rows", "0:300",
               "--replicas", 8, "--out", plan, "--json", report, "--time-limit", 3)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(report.read_text()).keys() >= KEYS
    done = run("place", "score", plan, "--trace", files / "t.npz", "--rows", "300:", "--json", report)
    assert done.returncode == 0, done.stderr
    assert json.loads(report.read_text()).keys() >= KEYS
    done = run("place", "export", plan, "--format", "sglang", "--out", out)
    assert done.returncode == 0, done.stderr
    exported = json.loads(out.read_text())
    assert list(exported) == ["physical_to_logical_map"]
    assert exported["physical_to_logical_map"] == json.loads(plan.read_text())["physical_to_logical_map"]


def test_bad_input_is_one_line_and_exit_2(files):
    (files / "c.yaml").write_text(CLUSTER.replace("ep: {size: 8}", "ep: {slotz: 8}"))
    done = run("place", "solve", "--trace", files / "t.npz", "--cluster", files / "c.yaml", "--out", files / "p.json")
    assert done.returncode == 2
    assert "ep.slotz: unknown key" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (files / "p.json").exists()
