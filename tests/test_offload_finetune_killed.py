"""Runs that are killed at random moments, or whose disk is full, continue bit by bit, by every method."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.killed_runs import SETTINGS
from tests.small_tuning import save_examples, save_model

KILLS = 20
ROOT = Path(__file__).parents[1]
NAMESPACE = ("unshare", "--map-root-user", "--mount")


def weights_of(out):
    return {key: value for file in sorted(out.glob("*.safetensors")) for key, value in load_file(file).items()}


def report_of(command, *, prefix=()):
    """What a module of tests says at its end."""
    command = [*prefix, sys.executable, "-W", "ignore", "-m", *command]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def assert_equal(found, expected):
    found, expected = weights_of(found), weights_of(expected)
    assert expected.keys() == found.keys()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


@pytest.mark.slow
@pytest.mark.parametrize("method", SETTINGS)
def test_a_killed_run_continues_bit_by_bit(method, tmp_path):
    save_model(tmp_path / "model", torch.bfloat16, num_experts=16)
    save_examples(tmp_path / "data.jsonl")
    said, errors = report_of(["tests.killed_runs", method, str(tmp_path), str(KILLS)])
    assert said["code"] == 0, errors[-2000:]
    assert said["killed"] >= KILLS // 2
    assert_equal(tmp_path / "killed", tmp_path / "whole")


def can_mount():
    return shutil.which("unshare") and not subprocess.run([*NAMESPACE, "true"], capture_output=True).returncode


@pytest.mark.slow
@pytest.mark.parametrize("method", SETTINGS)
def test_the_full_disk_is_one_line_and_an_intact_run(method, tmp_path):
    if not can_mount():
        pytest.skip("a disk of its own needs a mount namespace, which this system gives nobody")
    save_model(tmp_path / "model", torch.bfloat16)
    save_examples(tmp_path / "data.jsonl")
    said, errors = report_of(["tests.full_disks", method, str(tmp_path)], prefix=NAMESPACE)
    assert said["code"] == 0, errors[-2000:]
    assert len(said["failures"]) >= 8
    for failure in said["failures"]:
        assert (failure["code"], failure["lines"]) == (1, 1), failure
        assert "the disk is full; the run is intact" in failure["said"]
        assert len(failure["commits"]) < 2, "nothing is half-written"
    assert len({tuple(failure["commits"]) for failure in said["failures"]}) >= 2, "full before a commit and after it"
    assert_equal(tmp_path / "filled", tmp_path / "whole")
