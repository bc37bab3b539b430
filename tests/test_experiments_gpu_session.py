"""`make gpu` without a GPU: the order, the deadlines, what is left behind, and the exit codes."""

import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from experiments.gpu_session import __main__ as program
from experiments.gpu_session import environment, session, steps
from experiments.gpu_session.steps import Step
from experiments.gpu_session.synthetic import synthetic_trace
from routing.traces import RoutingTrace

ROOT = Path(__file__).parent.parent


def script(name, code, limit_s=30.0):
    return Step(name=name, command=(sys.executable, "-c", code), limit_s=limit_s)


def outcomes(out):
    with (out / "session.csv").open(encoding="utf-8") as file:
        return {row["step"]: row for row in csv.DictReader(file)}


def test_without_a_gpu_it_says_so_and_ends_with_three(tmp_path):
    if environment.find_gpu() is not None:
        pytest.skip("there is a GPU")
    command = [sys.executable, "-S", "-m", "experiments.gpu_session", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert done.stdout.startswith("no NVIDIA GPU here")
    assert not (tmp_path / "out").exists()
    made = subprocess.run(["make", "gpu", f"PYTHON={sys.executable}"], cwd=ROOT, capture_output=True, text=True)
    assert "no NVIDIA GPU here" in made.stdout
    assert "Error 3" in made.stderr


@pytest.mark.parametrize(
    ("said", "exit_code", "expected"),
    [
        ("GPU 0: NVIDIA H200 (UUID: GPU-1234)", 0, "NVIDIA H200"),
        ("No devices found.", 6, None),
        ("NVIDIA-SMI has failed because it couldn't communicate with the driver", 0, None),
    ],
)
def test_a_driver_is_asked_what_there_is(tmp_path, monkeypatch, said, exit_code, expected):
    driver = tmp_path / "nvidia-smi"
    driver.write_text(f"#!/bin/sh\necho '{said}'\nexit {exit_code}\n")
    driver.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    if expected is not None or not Path("/dev/nvidiactl").exists():
        assert environment.find_gpu() == expected


def test_steps_run_in_order_and_leave_logs_and_a_table(tmp_path):
    made = [
        script("first", "print('=== 3 passed, 1 skipped in 0.12s ===')"),
        script("second", "import sys; print('2 failed, 5 passed, 1 error in 1.50s (0:00:01)'); sys.exit(1)"),
        script("third", "print('a table')"),
    ]
    assert session.run_session(made, tmp_path, root=ROOT, gpu="a device") == 1
    found = outcomes(tmp_path)
    assert [(name, row["outcome"], row["exit_code"]) for name, row in found.items()] == [
        ("first", "passed", "0"),
        ("second", "failed", "1"),
        ("third", "passed", "0"),
    ]
    assert (found["first"]["passed"], found["first"]["skipped"]) == ("3", "1")
    assert (found["second"]["passed"], found["second"]["failed"]) == ("5", "3")
    assert found["third"]["passed"] == ""
    assert (tmp_path / "third.log").read_text() == "a table\n"
    assert json.loads((tmp_path / "session.json").read_text())["gpu"] == "a device"
    assert session.run_session(made[:1], tmp_path, root=ROOT) == 0


STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid, flush=True)
print("test_a PASSED\\ntest_b PASSED\\ntest_c FAILED", flush=True)
time.sleep(60)
"""


def test_a_deadline_interrupts_first_and_then_kills_the_group(tmp_path, monkeypatch):
    monkeypatch.setattr(session, "GRACE_S", 0.5)
    polite = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('what was measured follows')"
    began = time.monotonic()
    one = session.run_step(script("polite", polite, 1.2), tmp_path, ROOT)
    assert (one.outcome, one.exit_code) == ("interrupted", 0)
    assert (tmp_path / "polite.log").read_text() == "what was measured follows\n"
    two = session.run_step(script("stubborn", STUBBORN, 1.2), tmp_path, ROOT)
    assert (two.outcome, two.exit_code, two.passed, two.failed) == ("interrupted", -9, 2, 1)
    assert time.monotonic() - began < 20
    child = int((tmp_path / "stubborn.log").read_text().split()[0])
    for _ in range(50):
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            break
        time.sleep(0.1)
    else:
        pytest.fail("a child of the step is still running")


def test_what_there_is_no_time_for_is_left_out_and_named(tmp_path, monkeypatch):
    monkeypatch.setattr(session, "LEAST_S", 1.0)
    monkeypatch.setattr(session, "GRACE_S", 0.5)
    made = [script("long", "import time; time.sleep(60)", 30.0), script("later", "print('never')")]
    assert session.run_session(made, tmp_path, root=ROOT, total_s=2.0) == 1
    found = outcomes(tmp_path)
    assert found["long"]["outcome"] == "interrupted"
    assert float(found["long"]["limit_s"]) <= 2.0
    assert found["later"]["outcome"] == "left out"
    assert not (tmp_path / "later.log").exists()


def test_all_steps_fit_into_nine_minutes_and_begin_with_the_tests(tmp_path):
    made = steps.steps_of(Path(sys.executable), tmp_path)
    assert [step.name for step in made] == ["tests", "kernels", "trace", "offload", "more-tests"]
    assert session.TOTAL_S + session.GRACE_S <= 540
    # the last step takes what the others leave; those before it fit with 60 s for finding an environment
    assert sum(step.limit_s for step in made[:-1]) + 60 <= session.TOTAL_S
    for step in made:
        for argument in step.command:
            if argument.startswith(("tests/", "--ignore=")):
                assert (ROOT / argument.removeprefix("--ignore=")).is_file()


def test_the_commands_are_those_that_exist(tmp_path, run, capsys):
    made = {step.name: step.command for step in steps.steps_of(Path(sys.executable), tmp_path)}
    for name in ("kernels", "offload"):
        words = made[name][made[name].index("bench") :]
        assert run(*words[:2], "--help") == 0
        said = capsys.readouterr().out
        assert all(word in said for word in words if word.startswith("--"))


def test_every_test_that_asks_for_a_gpu_is_marked():
    asking = [file for file in (ROOT / "tests").glob("test_*.py") if '"cuda" if torch.cuda' in file.read_text()]
    assert len(asking) >= 6
    assert all("pytestmark = pytest.mark.gpu" in file.read_text() for file in asking if file != Path(__file__))


def test_an_environment_that_sees_no_gpu_is_not_taken(tmp_path, monkeypatch):
    """The interpreter of this test has a torch without CUDA here: the program goes on to install, which fails."""
    monkeypatch.setattr(environment, "PROBE", "raise SystemExit(1)")
    monkeypatch.setattr(environment, "_run", _without_pip(environment._run))
    found = environment.find_python(tmp_path, tmp_path)
    assert found == f"installing failed: no network (all of it: {tmp_path / 'install.log'})"
    monkeypatch.setattr(program, "find_gpu", lambda: "a device")
    monkeypatch.setattr(program, "ROOT", tmp_path)
    assert program.main(["--out", str(tmp_path / "out")]) == 2


def _without_pip(run):
    def refuse(command, timeout_s, folder=None):
        if "pip" in command or "venv" in command:
            return subprocess.CompletedProcess(command, 1, "", "warning\nno network\n")
        return run(command, timeout_s, folder)

    return refuse


def test_what_is_installed_is_taken(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(environment, "PROBE", "print('torch 2.11')")
    assert environment.find_python(tmp_path, tmp_path) == Path(sys.executable)
    assert "torch 2.11" in capsys.readouterr().out


def test_the_made_up_trace_repeats_itself_and_can_be_replayed(tmp_path):
    trace = synthetic_trace(400, 3, 16, 4, seed=0)
    trace.save(tmp_path / "t.npz")
    found = RoutingTrace.load(tmp_path / "t.npz")
    assert found.expert_TLK.shape == (400, 3, 4)
    assert (np.diff(np.sort(found.expert_TLK, axis=2), axis=2) > 0).all()
    again = [len(set(a) & set(b)) / 4 for a, b in zip(found.expert_TLK[:-1, 0], found.expert_TLK[1:, 0], strict=True)]
    assert 0.5 < np.mean(again) < 0.9
    counts = np.bincount(found.expert_TLK[:, 0].ravel(), minlength=16)
    assert counts.max() > 3 * counts.min()
    np.testing.assert_array_equal(synthetic_trace(400, 3, 16, 4, seed=0).expert_TLK, found.expert_TLK)
