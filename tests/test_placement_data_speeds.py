"""Measured speeds: curves of types and of single GPUs, noise smoothed, nonsense refused."""

import json

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from placement import load_cluster
from placement.cli import app
from placement.contract.spec import GpuType
from placement.data.speeds import MOST_CORRECTION, read_speeds, smoothed, with_speeds

CLUSTER = """
gpu_types: {a: {hbm: 2TB/s}, b: {}}
node_types: {n: {gpus: {type: a, count: 2}}}
nodes: [{type: n, count: 2, gpus: {1: {type: b, speed: 0.5, reserve: 1GiB}}}]
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "c.yaml").write_text(CLUSTER)
    return tmp_path


def test_types_get_the_median_curve(folder):
    (folder / "m.csv").write_text("gpu,batch,seconds\na,1,10us\na,1,30us\na,1,12us\na,64,2e-5\nb,1,1\n")
    speeds = read_speeds(folder / "m.csv")
    assert speeds == {"a": {1: pytest.approx(12e-6), 64: 2e-5}, "b": {1: 1.0}}
    rows = [{"gpu": gpu, "batch": batch, "seconds": s} for gpu, curve in speeds.items() for batch, s in curve.items()]
    (folder / "m.json").write_text(json.dumps(rows))
    assert read_speeds(folder / "m.json") == speeds
    found, notes = with_speeds(yaml.safe_load(CLUSTER), speeds)
    assert found["gpu_types"]["a"] == {"hbm": "2TB/s", "expert_seconds": speeds["a"]}
    assert found["nodes"] == yaml.safe_load(CLUSTER)["nodes"]
    assert notes == []


def test_single_gpus_get_a_curve_and_a_speed(folder):
    """Rank 3 is the second GPU of the second node, of type b; it takes twice as long as rank 0."""
    (folder / "m.csv").write_text("gpu,batch,seconds\n0,1,1e-5\n0,8,4e-5\n3,8,8e-5\n3,16,9e-5\n")
    done = CliRunner().invoke(app, ["speeds", str(folder / "m.csv"), "--cluster", str(folder / "c.yaml"),
                                    "--out", str(folder / "new.yaml")])  # fmt: skip
    assert "curves of 2 of 4 GPUs" in done.output
    cluster, before = load_cluster(folder / "new.yaml"), load_cluster(folder / "c.yaml")
    np.testing.assert_allclose(cluster.speed_G, [4 / 3, 0.5, 1, 2 / 3], rtol=1e-5)
    assert cluster.curves == (((1, 1e-5), (8, 4e-5)), (), (), ((8, 8e-5), (16, 9e-5)))
    for name in ("hbm_bytes_per_s_G", "node_G", "memory_bytes_G"):
        assert getattr(cluster, name).tolist() == getattr(before, name).tolist()


def test_gpus_without_a_batch_in_common_keep_their_speed():
    _, notes = with_speeds(yaml.safe_load(CLUSTER), {"0": {1: 1.0}, "1": {2: 1.0}})
    assert any("one batch in common" in note for note in notes)


@given(st.dictionaries(st.integers(1, 4096), st.floats(1e-7, 1e-2), min_size=1, max_size=12))
def test_smoothed_curves_are_what_a_cluster_file_may_have(curve):
    better, change = smoothed(curve)
    assert GpuType(expert_seconds=better).expert_seconds == better
    again, more = smoothed(better)
    np.testing.assert_allclose(list(again.values()), list(better.values()), rtol=1e-9)
    assert more <= min(change, 1) + 1e-9


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("gpu,batch\na,1\n", "expected gpu, batch, seconds and nothing else"),
        ("gpu,batch,seconds,x\na,1,1,1\n", "and nothing else"),
        ("gpu,batch,seconds\na,0,1\n", "expected a GPU, 1 to"),
        ("gpu,batch,seconds\na,1,-1\n", "row 1"),
        ("gpu,batch,seconds\na,1,nan\n", "row 1"),
        ("gpu,batch,seconds\na,one,1\n", "row 1: invalid literal"),
        ("gpu,batch,seconds\n", "expected rows of"),
        ("[1]", "row 1: expected"),
        ("[", "not readable"),
        ('{"gpu": "a"}', "expected rows of"),
    ],
)
def test_what_is_no_measurement_is_refused(folder, text, words):
    (folder / "m").write_text(text)
    with pytest.raises(ValueError, match=words):
        read_speeds(folder / "m")


def test_unknown_gpus_and_wild_curves_are_refused():
    cluster = yaml.safe_load(CLUSTER)
    for gpu in ("4", "c", "-1"):
        with pytest.raises(ValueError, match=r"neither a GPU type \(a, b\) nor a rank 0\.\.3"):
            with_speeds(cluster, {gpu: {1: 1.0}})
    with pytest.raises(ValueError, match="more than noise: measure again"):
        with_speeds(cluster, {"a": {1: 1.0, 2: 1 - 2 * MOST_CORRECTION}})
    with_speeds(cluster, {"a": {1: 1.0, 2: 1 - MOST_CORRECTION / 2}})
