"""`expertier train --processes N`: the folders of any run, one-line refusals, interrupts and killed processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from experiments.placed.interface import NAME, apart
from experiments.train.distributed.adapting import taken
from experiments.train.distributed.launch import start_name
from experiments.train.metrics import read_log
from experiments.train.run_folder import checkpoints
from moe import MoEForCausalLM
from tests.rank_processes import may_make_namespaces

ROOT = Path(__file__).parent.parent


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog\n" * 400)
    return path


def command(text, out, *options):
    return [sys.executable, "-m", "experiments.cli", "train", "--data", str(text), "--out", str(out), *options]


def start(*arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    # of its own group, as a shell starts it; a Ctrl-C of the shell reaches all of the group
    return subprocess.Popen(
        arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def finish(process, limit_s=600):
    try:
        said, complained = process.communicate(timeout=limit_s)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, said, complained


def begin(text, out, *options):
    return start(*command(text, out, "--preset", "smoke", "--router", "rmoe", *options))


@pytest.mark.slow
def test_two_processes_leave_the_folder_of_any_run_and_one_process_continues_it(run, text, tmp_path):
    out = tmp_path / "a"
    options = ("--steps", "4", "--processes", "2", "--parallel", "expert=2")
    code, said, complained = finish(begin(text, out, *options))
    assert code == 0, complained
    assert "4 steps" in said
    assert "Traceback" not in complained
    rows = read_log(out / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(row["processes"] == 2 and row["dispatched_bytes"] > 0 for row in rows)
    assert json.loads((out / "result.json").read_text())["steps"] == 4
    model = MoEForCausalLM.from_pretrained(out)
    assert model.config.router == "rmoe"
    assert {path.name for path in checkpoints(out)[-1].iterdir()} >= {"training_optimizer", "tokenizer.json"}
    assert run("train", "--resume", "--out", out) == 0
    assert [row["step"] for row in read_log(out / "metrics.jsonl")] == [1, 2, 3, 4]


@pytest.mark.slow
def test_degrees_by_time_give_the_losses_of_one_degree_and_are_told(text, tmp_path):
    options = ("--set", "precision=float32", "--steps", "6", "--processes", "2", "--parallel")
    assert finish(begin(text, tmp_path / "one", *options, "expert=2"))[0] == 0
    code, _, complained = finish(begin(text, tmp_path / "by_time", *options, "auto"))
    assert code == 0, complained
    one, by_time = (read_log(tmp_path / name / "metrics.jsonl") for name in ("one", "by_time"))
    assert [row["loss"] for row in by_time] == pytest.approx([row["loss"] for row in one], rel=1e-6)
    assert {(row["expert_degree"], row["parts"]) for row in by_time} == {(2, 1), (2, 2), (1, 1)}
    assert {row["dispatched_bytes"] > 0 for row in by_time if row["expert_degree"] == 1} == {False}
    assert complained.count("degree: about") == len(taken(tmp_path / "by_time"))
    assert sum(found.steps for found in taken(tmp_path / "by_time")) == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--processes", "3"), "3 processes cannot share out the 8 sequences of a step"),
        (("--processes", "2", "--parallel", "expert=3"), "are 3 processes, but there are 2"),
        (("--processes", "4", "--parallel", "tensor=4"), "reads like data=2,expert=2"),
        (("--processes", "2", "--backend", "jax"), "are for --backend torch"),
        (("--processes", "2", "--set", "optimizer=muon"), "the optimizer muon runs in one process"),
        (("--processes", "2", "--router", "moe-x"), "cannot be trained on several processes"),
        (("--processes", "2", "--parallel", "expert=2", "--router", "latent"), "no bank of plain experts"),
        (
            ("--processes", "8", "--parallel", "auto", "--set", "model.num_experts=12"),
            "auto must divide the 12 experts of a layer by 8 processes",
        ),
    ],
)
def test_what_cannot_be_split_is_refused_before_any_process_starts(run, text, tmp_path, capfd, options, message):
    assert run("train", "--preset", "smoke", "--data", text, "--out", tmp_path / "a", *options) == 2
    assert message in " ".join(capfd.readouterr().err.split())
    assert not (tmp_path / "a").exists()


def test_what_processes_said_before_a_restart_is_kept_apart_or_the_start_is_refused(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "any")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    names = []
    for restarts in range(3):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(restarts))
        names.append(start_name())
    assert len(set(names)) == 3
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="need TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        start_name()
    # torchrun then has a new store for every start, and machines count their restarts for themselves
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    names = {start_name()}
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert names == {start_name()}


@pytest.mark.slow
def test_groups_are_made_anew_after_each_restart_beside_what_the_store_still_has(tmp_path):
    options = ("--standalone", "--nproc-per-node=2", "--max-restarts=3")
    code, _, complained = finish(
        start(sys.executable, "-m", "torch.distributed.run", *options, "-m", "tests.restarted_ranks", str(tmp_path))
    )
    assert code == 0, complained
    kept = {file.stem: json.loads(file.read_text())["kept"] for file in tmp_path.glob("*.json")}
    assert kept == {f"{start} {rank}": start > 0 for start in range(3) for rank in range(2)}


def wait_for(condition, process, limit_s=600):
    deadline = time.monotonic() + limit_s
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def steps_done(out):
    log = out / "metrics.jsonl"
    return len(read_log(log)) if log.is_file() else 0


@pytest.mark.slow
def test_an_interrupt_saves_the_step_that_it_came_in_and_the_run_goes_on(text, tmp_path):
    out = tmp_path / "a"
    process = begin(text, out, "--steps", "2000", "--processes", "2")
    wait_for(lambda: steps_done(out) >= 3, process)
    os.killpg(process.pid, signal.SIGINT)
    code, _, complained = finish(process)
    assert code == 130
    assert "Traceback" not in complained
    (saved,) = checkpoints(out)
    assert int(saved.name.removeprefix("step_")) == steps_done(out) >= 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("parallel", "steps", "kills", "tolerance"),
    # times, and so the order of sums, differ from one run to the next where degrees follow them
    [("expert=2", 60, (24, 45), 0), ("auto", 30, (24,), 1e-5)],
)
def test_a_run_whose_processes_are_killed_ends_with_the_same_loss(text, tmp_path, parallel, steps, kills, tolerance):
    options = ("--set", "precision=float32", "--steps", str(steps), "--processes", "2", "--parallel", parallel)
    assert finish(begin(text, tmp_path / "calm", *options))[0] == 0
    out = tmp_path / "killed"
    process = begin(text, out, *options, "--max-restarts", "3")
    for wanted in kills:
        wait_for(lambda wanted=wanted: steps_done(out) >= wanted, process)
        workers = [child for child in psutil.Process(process.pid).children() if "experiments.cli" in child.cmdline()]
        assert len(workers) == 2
        workers[wanted % 2].send_signal(signal.SIGKILL)
    code, _, complained = finish(process)
    assert code == 0, complained
    calm, killed = (read_log(tmp_path / name / "metrics.jsonl") for name in ("calm", "killed"))
    losses = [row["loss"] for row in calm]
    assert [row["loss"] for row in killed] == pytest.approx(losses, rel=tolerance, abs=0)
    assert not list((out / "checkpoints").glob(".*"))


TWO_MACHINES = """
for number in 0 1; do
  ip netns exec $number "$0" -m torch.distributed.run --nnodes=1:2 --nproc-per-node=1 --max-restarts=3 \\
    --rdzv-backend=c10d --rdzv-endpoint=10.77.0.2:29400 --rdzv-conf=is_host=$((1 - number)),last_call_timeout=5 \\
    --local-addr=10.77.0.$((number + 2)) "$@" &
  first=${first:-$!}
done
wait $first
"""
"""Network namespaces stand for machines; names of hosts mean nothing there, so addresses are given."""


@pytest.mark.slow
@pytest.mark.skipif(not may_make_namespaces(), reason="needs the right to make network namespaces")
def test_one_of_two_machines_disappears_and_the_other_ends_the_run(text, tmp_path, monkeypatch):
    options = ("--preset", "smoke", "--router", "rmoe", "--set", "precision=float32", "--steps", "26")
    assert finish(start(*command(text, tmp_path / "one", *options, "--processes", "2")))[0] == 0
    out = tmp_path / "two"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", NAME)
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    process = start(*apart(2, 1e9), "sh", "-c", TWO_MACHINES, *command(text, out, *options))
    wait_for(lambda: steps_done(out) >= 23, process)
    started = psutil.Process(process.pid).children(recursive=True)
    (second,) = (child for child in started if "--local-addr=10.77.0.3" in child.cmdline())
    for lost in (second, *second.children()):
        lost.kill()
    code, _, complained = finish(process)
    assert code == 0, complained
    rows, expected = (read_log(tmp_path / name / "metrics.jsonl") for name in ("two", "one"))
    assert [row["processes"] for row in rows] == [2] * 20 + [1] * 6
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in expected], rel=1e-5)
