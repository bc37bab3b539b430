"""Runs that are killed with SIGKILL at random moments continue bit by bit, by every method."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.killed_runs import SETTINGS
from tests.small_tuning import save_examples, save_model

KILLS = 20


def weights_of(out):
    return {key: value for file in sorted(out.glob("*.safetensors")) for key, value in load_file(file).items()}


@pytest.mark.slow
@pytest.mark.parametrize("method", SETTINGS)
def test_a_killed_run_continues_bit_by_bit(method, tmp_path):
    save_model(tmp_path / "model", torch.bfloat16, num_experts=16)
    save_examples(tmp_path / "data.jsonl")
    command = [sys.executable, "-W", "ignore", "-m", "tests.killed_runs", method, str(tmp_path), str(KILLS)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["code"] == 0, done.stderr[-2000:]
    assert said["killed"] >= KILLS // 2
    expected, found = weights_of(tmp_path / "whole"), weights_of(tmp_path / "killed")
    assert expected.keys() == found.keys()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
