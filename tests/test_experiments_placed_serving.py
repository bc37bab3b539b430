"""`generate` and `serve` with `--processes N`: the bits of one process, and what is left when one of them ends."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
import torch

from experiments.placed.serving import equal_parts_E, owners, owners_by
from moe import MoEForCausalLM, save_byte_tokenizer
from placement import Cluster, Plan
from tests.rank_processes import run_ranks

ROOT = Path(__file__).parent.parent
E, L = 6, 3
PROMPT = "the quick brown fox"
MOST_S = 300
"""Seconds of a launch on a busy machine."""


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


def start(command, *arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-m", "experiments.cli", command, *map(str, arguments)]
    return subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process):
    """Exit code and lines on stderr."""
    try:
        _, complained = process.communicate(timeout=MOST_S)
    finally:
        for left in (*psutil.Process(process.pid).children(), process) if process.poll() is None else ():
            left.kill()
    return process.returncode, complained.splitlines()


def worker_of(process, rank):
    """A process that a launcher started."""
    children = psutil.Process(process.pid).children()
    (found,) = (child for child in children if child.environ().get("RANK") == str(rank))
    return found


@pytest.mark.slow
def test_logits_of_three_processes_have_the_bits_of_one(folder, tmp_path):
    # process 0 has two experts of each layer, process 1 two and a copy, process 2 the last two
    plan_of([[0, 1, 0, 2, 3, 1, 4, 5, 4]] * L, 3).save(tmp_path / "plan.json")
    found = run_ranks(3, "spread_ranks", str(folder), str(tmp_path / "plan.json"))
    assert found["is_equal"] == [True] * 4
    # an expert is read by one process; only process 0 has the weights outside experts
    assert sum(found["bytes_read"]) <= found["whole_bytes_read"]
    assert all(found["bytes_read"])
    assert found["weight_bytes"][0] > 0
    assert found["weight_bytes"][1:] == [0, 0]
    assert found["slots"] == [[1] * L, [3] * L, [2] * L]


@pytest.mark.slow
def test_generate_on_processes_gives_the_tokens_of_one_and_its_report(run, folder, tmp_path):
    options = ("--prompt", PROMPT, "--max-new-tokens", 8, "--cpu-memory", "2GiB", "--json")
    assert run("generate", folder, *options, tmp_path / "one.json", "--arithmetic", "fixed") == 0
    code, complained = finish(start("generate", folder, *options, tmp_path / "two.json", "--processes", 2))
    assert code == 0, complained
    alone, both = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json"))
    assert both["token_ids"] == alone["token_ids"]
    assert [report["slots_per_layer"] for report in both["processes"]] == [[3] * L] * 2


@pytest.mark.slow
def test_a_process_that_cannot_load_is_told_of_in_one_line(folder):
    code, complained = finish(start("generate", folder, "--prompt", "a", "--processes", 2, "--cpu-memory", "100MiB"))
    assert (code, len(complained)) == (2, 1), complained
    assert "too small" in complained[0]


@pytest.mark.slow
def test_an_interrupt_ends_all_processes(folder):
    options = ("--prompt", PROMPT, "--max-new-tokens", 100_000, "--context", 200_000, "--cpu-memory", "2GiB")
    process = start("generate", folder, *options, "--processes", 2)
    process.stdout.read(1)
    workers = [worker_of(process, rank) for rank in range(2)]
    process.send_signal(signal.SIGINT)
    code, complained = finish(process)
    assert code == 130
    assert sum("interrupted" in line for line in complained) == 1
    assert "Traceback" not in "".join(complained)
    assert not any(worker.is_running() for worker in workers)


@pytest.mark.slow
def test_a_server_answers_from_two_processes_and_ends_in_one_line_when_one_is_killed(run, folder, tmp_path):
    options = ("--max-new-tokens", 12, "--cpu-memory", "2GiB", "--arithmetic", "fixed", "--json", tmp_path / "a.json")
    assert run("generate", folder, "--prompt", PROMPT, *options) == 0
    expected = json.loads((tmp_path / "a.json").read_text())
    server = start("serve", folder, "--port", 0, "--processes", 2, "--cpu-memory", "2GiB")
    try:
        url = server.stderr.readline().split()[0]
        while "ready" not in server.stderr.readline():
            assert server.poll() is None
        body = {"prompt": PROMPT, "temperature": 0, "max_tokens": 12}
        answer = httpx.post(f"{url}/completions", json=body, timeout=MOST_S).json()
        assert answer["choices"][0]["text"] == expected["text"]
        killed = time.monotonic()
        worker_of(server, 1).kill()
    finally:
        code, complained = finish(server)
    assert code == 128 + signal.SIGKILL
    assert time.monotonic() - killed < 60
    assert [line for line in complained if "process 1 of 2 was ended by SIGKILL" in line]
    assert "Traceback" not in "".join(complained)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "say what each process may use: --cpu-memory"),
        (("--cpu-memory", "2GiB", "--trace", "t.npz"), "--trace records one process"),
        (("--cpu-memory", "2GiB", "--arithmetic", "exact"), "take --arithmetic fixed"),
        (("--cpu-memory", "2GiB", "--gpu-memory", "2GiB"), "--processes are of the CPU"),
        (("--cpu-memory", "2GiB", "--depth", "auto"), "would differ between processes"),
    ],
)
def test_options_that_several_processes_cannot_keep_are_refused(
    run, folder, tmp_path, capfd, monkeypatch, options, message
):
    monkeypatch.chdir(tmp_path)
    assert run("generate", folder, "--prompt", "a", "--processes", "2", *options) == 2
    assert message in " ".join(capfd.readouterr().err.split())


def test_a_server_of_members_runs_on_one_process(run, tmp_path, capfd):
    (tmp_path / "members.yaml").write_text("")
    assert run("serve", "--members", tmp_path / "members.yaml", "--processes", "2") == 2
    assert "--processes is for one model" in capfd.readouterr().err


def test_experts_are_dealt_to_processes(tmp_path):
    assert equal_parts_E(7, 3) == [0, 0, 0, 1, 1, 2, 2]
    assert owners([4, 2], None, 2) == [[0, 0, 1, 1], [0, 1]]
    # slots 0..3 are GPU 0's; experts 0 and 1 are on both, so they are dealt in turn
    plan = plan_of([[0, 1, 2, 3, 4, 5, 0, 1]], 2)
    assert owners_by(plan, 2) == [[0, 1, 0, 0, 1, 1]]
    with pytest.raises(ValueError, match="the plan is for 2 GPUs; start one process for each, not 3"):
        owners_by(plan, 3)
    with pytest.raises(ValueError, match="no slot for expert 5 of layer 0"):
        owners_by(plan_of([[0, 1, 2, 3, 4, 4]], 2), 2)
    plan.save(tmp_path / "plan.json")
    with pytest.raises(ValueError, match=r"the plan is of layers of \[6\] experts, the model \[6, 6\]"):
        owners([6, 6], tmp_path / "plan.json", 2)
