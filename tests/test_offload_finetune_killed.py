"""Runs that are killed with SIGKILL at random moments continue bit by bit, by every method."""

import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from tests.small_tuning import LENGTH, save_examples, save_model

SETTINGS = {
    "zo": ("--learning-rate", "1e-3"),
    "lora": ("--targets", "q_proj", "--learning-rate", "1e-2"),
    "full": ("--learning-rate", "1e-3", "--weight-decay", "0.1"),
}
STEPS, KILLS = 24, 7


def command(folder, method, out, *more):
    sizes = ("--sequence-length", str(LENGTH), "--steps", str(STEPS), "--checkpoint-every", "2", "--cache-experts", "2")
    start = [sys.executable, "-W", "ignore", "-m", "experiments.cli", "finetune", str(folder / "model")]
    data = ("--data", str(folder / "data.jsonl"), "--method", method, "--out", str(folder / out))
    return [*start, *data, *sizes, *SETTINGS[method], *more]


def weights_of(out):
    return {key: value for file in sorted(out.glob("*.safetensors")) for key, value in load_file(file).items()}


@pytest.mark.slow
@pytest.mark.parametrize("method", SETTINGS)
def test_a_killed_run_continues_bit_by_bit(method, tmp_path):
    save_model(tmp_path / "model", torch.bfloat16, num_experts=16)
    save_examples(tmp_path / "data.jsonl")
    subprocess.run(command(tmp_path, method, "whole"), check=True, capture_output=True)
    moments, killed = random.Random(0), 0
    for attempt in range(40):
        more = ("--resume",) if (tmp_path / "killed" / "finetune.json").is_file() else ()
        process = subprocess.Popen(command(tmp_path, method, "killed", *more), stderr=subprocess.PIPE)
        if killed < KILLS:
            commits, before = tmp_path / "killed" / "checkpoints", _last(tmp_path / "killed")
            # loading takes most of the time: wait for the first new commit, then for a part of a second
            while process.poll() is None and (not commits.is_dir() or _last(tmp_path / "killed") == before):
                time.sleep(0.001)
            time.sleep(moments.random() * 0.2)
            process.send_signal(signal.SIGKILL)
        said = process.communicate()[1]
        killed += process.returncode == -signal.SIGKILL
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, (attempt, said[-800:])
    assert killed >= 3
    expected, found = weights_of(tmp_path / "whole"), weights_of(tmp_path / "killed")
    assert expected.keys() == found.keys()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


def _last(out):
    folder = out / "checkpoints"
    return max((path.name for path in folder.glob("step_*")), default="") if folder.is_dir() else ""
