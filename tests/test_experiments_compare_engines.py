"""Engines of a comparison: a Ray cluster gives what this machine gives, and starts a run again whose process died."""

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from threading import Thread
from time import monotonic, sleep

import pytest

from experiments.compare.engines import execute
from experiments.compare.runs import Text, plan_runs

LIMIT_S = 300


@pytest.fixture
def plan(tiny_training, tmp_path):
    """Two runs in a folder of their own."""
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 400)

    def runs(name, **changes):
        model = tiny_training.model | {"vocab_size": 256}
        base = replace(tiny_training, model=model, **changes)
        return plan_runs(["top2", "loss-free"], base, 1, Text(data=str(text)), tmp_path / name)

    return runs


def results(runs, engine):
    found = {}
    execute(runs, 2, lambda run, result: found.setdefault(run.variant, result), engine)
    return found


def test_an_engine_that_is_unknown_or_not_installed_is_refused(plan, monkeypatch):
    with pytest.raises(ValueError, match="unknown engine 'rays'"):
        results(plan("a"), "rays")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"install expertier\[ray\]"):
        results(plan("a"), "ray")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_ray_gives_what_this_machine_gives_whatever_dies(plan, tmp_path, monkeypatch):
    pytest.importorskip("ray", reason="needs the extra expertier[ray]")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    settings = {"steps": 60, "checkpoint_every": 5}
    wanted = results(plan("local", **settings), "local")
    runs = [replace(run, folder=run.folder.relative_to(tmp_path)) for run in plan("ray", **settings)]
    killed = []
    Thread(target=lambda: killed.append(kill_trainer_of(tmp_path / runs[0].folder)), daemon=True).start()
    found = results(runs, "ray")
    assert {result["status"] for result in found.values()} == {"finished"}, found
    assert killed == [True]
    for variant, result in wanted.items():
        assert found[variant]["held_out_bits_per_byte"] == result["held_out_bits_per_byte"]


def kill_trainer_of(folder: Path) -> bool:
    """SIGKILL the process that trains there, once it has written a checkpoint."""
    start = monotonic()
    while monotonic() - start < LIMIT_S:
        if any(folder.glob("checkpoints/step_*")):
            for process in Path("/proc").glob("[0-9]*"):
                if is_task(process):
                    os.kill(int(process.name), signal.SIGKILL)
                    return True
        sleep(0.05)
    return False


def is_task(process: Path) -> bool:
    """Whether Ray runs a task there: it shows the task's function in the process title."""
    try:
        return process.joinpath("cmdline").read_bytes().startswith(b"ray::_execute_in")
    except OSError:
        return False
