"""Ctrl-C, kill -9 and time limits of real processes."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pulp
import pytest

from placement import Cluster, Plan, Problem, generate_trace, solve
from placement.checking.check import check_plan
from placement.ilp.run import solve_milp

CLUSTER = """
model: {experts: 16}
node_types: {n: {gpus: {count: 4}}}
nodes: [{type: n, count: 2}]
"""


@pytest.mark.slow
def test_ctrl_c_writes_the_best_plan_so_far(tmp_path):
    trace = generate_trace(tokens=4000, layers=12, experts=64, top_k=4, blocks=8, tokens_per_sequence=20)
    trace.save(tmp_path / "t.npz")
    (tmp_path / "c.yaml").write_text(CLUSTER.replace("experts: 16", "experts: 64"))
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "experiments.cli", "place", "--help"], stdout=subprocess.DEVNULL, check=True)
    start_s = time.perf_counter() - started
    solving = subprocess.Popen(
        [sys.executable, "-m", "experiments.cli", "place", "solve", "--trace", tmp_path / "t.npz", "--cluster",
         tmp_path / "c.yaml", "--objective", "fanout+balance", "--solver", "lns", "--time-limit", "120",
         "--out", tmp_path / "plan.json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip
    time.sleep(max(3.0, 3 * start_s))  # lns searches its start for 36 of 120 s
    assert solving.poll() is None
    solving.send_signal(signal.SIGINT)
    _, errors = solving.communicate(timeout=90)
    assert solving.returncode == 0, errors
    assert check_plan(Plan.load(tmp_path / "plan.json"), made_from=Problem.from_trace(trace, Cluster.grid(2, 4))) == []


WRITER = """
import sys
from placement import Plan
plan = Plan.load(sys.argv[1])
print("ready", flush=True)
while True:
    plan.save(sys.argv[2])
"""


def test_a_killed_writer_leaves_no_torn_plan(tmp_path):
    problem = Problem.from_loads(np.random.default_rng(0).random((20, 64)), Cluster.grid(1, 8))
    plan = solve(problem, solver="contiguous")
    plan.save(tmp_path / "whole.json")
    for delay in (0.0, 0.037):
        writing = subprocess.Popen(
            [sys.executable, "-c", WRITER, tmp_path / "whole.json", tmp_path / "p.json"], stdout=subprocess.PIPE
        )
        assert writing.stdout.readline() == b"ready\n"
        time.sleep(delay)
        os.kill(writing.pid, signal.SIGKILL)
        writing.communicate()
        if (tmp_path / "p.json").exists():
            assert json.loads((tmp_path / "p.json").read_text()) == plan.to_json()


@pytest.mark.parametrize(
    ("solver", "objective"),
    [
        ("search", "fanout+balance"),
        pytest.param("lns", "fanout", marks=pytest.mark.slow),
        pytest.param("ilp", "balance", marks=pytest.mark.slow),
    ],
)
def test_the_time_limit_binds(solver, objective):
    trace = generate_trace(tokens=3000, layers=8, experts=64, top_k=6, blocks=8, tokens_per_sequence=30)
    problem = Problem.from_trace(trace, Cluster.grid(2, 4))
    began = time.monotonic()
    solve(problem, objective=objective, solver=solver, time_limit_s=1, processes=1)
    assert time.monotonic() - began < 3  # three times the limit, for a busy machine


def programme(seed, size=30):
    rng, model = random.Random(seed), pulp.LpProblem("model", pulp.LpMinimize)
    choices = [model.add_variable(f"x{i}", cat="Binary") for i in range(size)]
    model += pulp.lpSum(-rng.random() * choice for choice in choices)
    for _ in range(10):
        model += pulp.lpSum(rng.random() * choice for choice in choices) <= 6
    return model


def test_an_interrupt_as_soon_as_the_solver_runs_leaves_no_thread_in_it(monkeypatch):
    """A thread that stays inside HiGHS while Python ends would abort the process."""
    start = threading.Thread.start

    def interrupted(thread):
        start(thread)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        solve_milp(programme(0, size=120), time_limit_s=60)
    assert time.monotonic() - began < 30
    assert [thread for thread in threading.enumerate() if thread.name == "expertier-highs"] == []


def test_programmes_of_several_threads_take_turns():
    found = {}

    def minimise(seed):
        found[seed] = solve_milp(programme(seed), time_limit_s=20).is_optimal

    threads = [threading.Thread(target=minimise, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict.fromkeys(range(4), True)
