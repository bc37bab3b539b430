"""Presets of known machines: valid cluster files in which a rack joined by NVLink is one node."""

import pytest
import yaml
from typer.testing import CliRunner

from placement import Cluster, load_cluster
from placement.cli import app
from placement.data.presets import PRESETS, preset_cluster


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_cluster(name):
    cluster = Cluster.from_mapping(preset_cluster(name, 3))
    assert cluster.num_nodes == 3
    assert cluster.gpus_per_node == PRESETS[name]["node"]["gpus"]
    assert cluster.nic_bytes_per_s_G[0] == 50e9
    assert cluster.node_link_ratio > 5


def test_a_rack_is_one_node_and_options_override(tmp_path):
    arguments = ["cluster", "--preset", "gb200-nvl72", "--nodes", "2", "--nic", "800Gb/s", "--out", tmp_path / "c.yaml"]
    done = CliRunner().invoke(app, [str(one) for one in arguments])
    assert done.exit_code == 0, done.output
    cluster = load_cluster(tmp_path / "c.yaml")
    assert (cluster.num_gpus, cluster.num_nodes, cluster.nic_bytes_per_s_G[0]) == (144, 2, 100e9)
    assert cluster.dram_bytes_M.tolist() == [17e12] * 2
    assert not any(guess.startswith("nic") for guess in yaml.safe_load((tmp_path / "c.yaml").read_text())["guessed"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--preset", "gb200"], "unknown preset 'gb200'"),
        ([], "either a FILE that describes a node, or --preset"),
        (["--preset", "mi355x", "--nvlink-domain", "8"], "--nvlink-domain is of a FILE"),
    ],
)
def test_wrong_questions_are_refused(tmp_path, arguments, words):
    done = CliRunner().invoke(app, ["cluster", *arguments, "--out", str(tmp_path / "c.yaml")])
    assert words in str(done.exception)
    with pytest.raises(ValueError, match="at least one node"):
        preset_cluster("mi355x", 0)
