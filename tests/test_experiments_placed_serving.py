"""`expertier generate --processes N`: the same tokens as one process, each process with its own experts only."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.placed.serving import equal_parts_LE, processes_LE
from moe import MoEForCausalLM, save_byte_tokenizer
from placement import Cluster, Plan

ROOT = Path(__file__).parent.parent
E, L = 6, 3
PROMPT = "the quick brown fox"


@pytest.fixture
def folder(tiny_config, tmp_path):
    torch.manual_seed(0)
    MoEForCausalLM(tiny_config(vocab_size=256)).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    save_byte_tokenizer(tmp_path / "model")
    return tmp_path / "model"


def plan_of(rows, gpus):
    return Plan(
        physical_to_logical_LP=np.array(rows),
        num_experts=E,
        cluster=Cluster.grid(1, gpus),
        layer_ids=tuple(range(len(rows))),
        hidden_layers=len(rows),
    )


def generate(folder, out, *options):
    """Token ids and bytes read of a generation by command."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    base = [sys.executable, "-m", "experiments.cli", "generate", str(folder), "--prompt", PROMPT]
    command = [*base, "--max-new-tokens", "8", "--cpu-memory", "2GiB", "--json", str(out), *map(str, options)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return read(out)


def read(report):
    found = json.loads(report.read_text())
    return found["token_ids"], found["bytes_read"]


@pytest.mark.slow
def test_processes_with_a_plan_generate_what_one_process_generates(run, folder, tmp_path):
    # process 0 has two experts of each layer, process 1 the other four and a copy
    plan_of([[0, 1, 0, 1, 2, 3, 4, 5]] * L, 2).save(tmp_path / "plan.json")
    options = ("--max-new-tokens", "8", "--cpu-memory", "2GiB", "--prefetch", "off", "--json", tmp_path / "one.json")
    assert run("generate", folder, "--prompt", PROMPT, *options) == 0
    alone, all_bytes = read(tmp_path / "one.json")
    both, own_bytes = generate(folder, tmp_path / "two.json", "--processes", 2, "--plan", tmp_path / "plan.json")
    assert both == alone
    assert 0 < own_bytes <= all_bytes * 2 / 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "say what each process may use: --cpu-memory"),
        (("--cpu-memory", "2GiB", "--trace", "t.npz"), "--trace records one process"),
    ],
)
def test_options_that_several_processes_cannot_keep_are_refused(
    run, folder, tmp_path, capfd, monkeypatch, options, message
):
    monkeypatch.chdir(tmp_path)
    assert run("generate", folder, "--prompt", "a", "--processes", "2", *options) == 2
    assert message in " ".join(capfd.readouterr().err.split())


def test_experts_are_dealt_to_processes():
    assert equal_parts_LE(1, 7, 3).tolist() == [[0, 0, 0, 1, 1, 2, 2]]
    # slots 0..3 are GPU 0's; experts 0 and 1 are on both, so they are dealt in turn
    plan = plan_of([[0, 1, 2, 3, 4, 5, 0, 1]], 2)
    assert processes_LE(plan, 2).tolist() == [[0, 1, 0, 0, 1, 1]]
    with pytest.raises(ValueError, match="the plan is for 2 GPUs; start one process for each, not 3"):
        processes_LE(plan, 3)
    with pytest.raises(ValueError, match="no slot for expert 5 of layer 0"):
        processes_LE(plan_of([[0, 1, 2, 3, 4, 4]], 2), 2)
