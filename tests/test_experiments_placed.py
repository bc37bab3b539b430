"""`expertier place run`: what a plan moves, predicted and counted as the same integers."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experiments.placed.forecast import forecast
from experiments.placed.run import run_plans
from experiments.placed.turns import held_by, turns_EG
from experiments.placed.work import calls_of, source_T
from placement import Cluster, Plan
from routing.traces import RoutingTrace

ROOT = Path(__file__).parent.parent
E, K, L = 12, 3, 2


def plan_of(map_LP, gpus, dispatch="uniform", nodes=1):
    cluster = Cluster.grid(nodes, gpus // nodes)
    return Plan(
        physical_to_logical_LP=np.array(map_LP),
        num_experts=E,
        cluster=cluster,
        layer_ids=tuple(range(len(map_LP))),
        hidden_layers=len(map_LP),
        dispatch=dispatch,
    )


@pytest.fixture
def trace():
    random = np.random.default_rng(0)
    expert_TLK = np.argsort(random.gumbel(size=(90, L, E)), axis=2)[:, :, :K].astype(np.int16)
    expert_TLK[4, 0, 1:] = -1
    expert_TLK[5, 1] = -1
    sequence_T = np.repeat(np.arange(9), 10).astype(np.int32)
    return RoutingTrace(expert_TLK=expert_TLK, sequence_T=sequence_T, metadata={"num_experts": E})


def test_a_layer_is_forecast_as_counted_by_hand():
    # expert 0 on both processes, turn about; 1 on process 0, 2 on process 1
    turns = np.array([[1, 1], [1, 0], [0, 1]])
    calls = [[np.array([[0, 1], [0, 2], [-1, -1]], np.int16)], [np.array([[2, -1]], np.int16)]]
    moved = forecast(calls, [turns, turns])
    # token 0: slot 0 is even, so expert 0 on process 0, with expert 1; token 1: slot 2 is even, process 0, and 2 on 1
    assert moved.row_GG.tolist() == [[2, 1], [0, 1]]
    assert moved.pair_GG.tolist() == [[3, 1], [0, 1]]
    assert (moved.remote_rows, moved.remote_pairs) == (1, 1)
    assert moved.balancedness == pytest.approx(2.5 / 3)


def test_copies_take_turns_as_the_policy_says():
    rows = [[*range(E), 0, 0, 1, 2]]
    uniform = plan_of(rows, 4, nodes=2)
    copies = np.zeros((E, 4), np.int64)
    for rank, experts in enumerate(held_by(uniform, 0, 4)):
        copies[experts, rank] = 1
    assert held_by(uniform, 0, 5)[3:] == [[0, 1, 2], []]
    load = np.ones(E)
    assert turns_EG(uniform, copies, load, 0)[0].tolist() == [1, 0, 0, 1]
    nearest = replace(uniform, dispatch="nearest")
    # expert 0 is on processes 0 and 3: 0 has it itself, 2 has it on its node, 1 on its node as well
    assert [turns_EG(nearest, copies, load, source)[0].tolist() for source in range(4)] == [
        [1, 0, 0, 0],
        [1, 0, 0, 0],
        [0, 0, 0, 1],
        [0, 0, 0, 1],
    ]
    quota = turns_EG(replace(uniform, dispatch="quota"), copies, load, 0)
    assert (quota.sum(axis=1) > 0).all()
    assert not quota[copies == 0].any()


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.integers(0, 40), min_size=1, max_size=60), st.integers(1, 5), st.integers(1, 9))
def test_every_row_is_in_one_call_and_all_processes_make_equally_many(sequences, processes, rows_per_call):
    trace = RoutingTrace(
        expert_TLK=np.zeros((len(sequences), 1, 1), np.int16), sequence_T=np.array(sequences, np.int32)
    )
    calls = calls_of(source_T(trace, processes), processes, rows_per_call)
    assert len({len(own) for own in calls}) == 1
    assert sorted(row for own in calls for call in own for row in call.tolist()) == list(range(len(sequences)))
    assert all(len(call) <= rows_per_call for own in calls for call in own)


def test_no_thread_of_a_group_outlives_it(trace, monkeypatch):
    """A group of one process: its threads would run on while Python ends."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    one, other = (plan_of([np.random.default_rng(seed).permutation(E)] * L, 1) for seed in range(2))
    assert run_plans({"one": one}, trace, then=other, forwards=2)["migration"]["missed"] == 0
    threads = [Path(f"/proc/self/task/{task}/comm").read_text() for task in os.listdir("/proc/self/task")]
    assert [name for name in threads if "gloo" in name or "tcpstore" in name] == []


def place_run(folder, *arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "experiments.cli", "place", "run", *map(str, arguments)]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_experts_move_to_more_and_to_fewer_processes(trace, tmp_path):
    trace.save(tmp_path / "trace.npz")
    slots = np.stack([np.random.default_rng(layer).permutation(E) for layer in range(L)])
    for gpus in (2, 4):
        plan_of(slots, gpus).save(tmp_path / f"{gpus}.json")
    for one, other in ((2, 4), (4, 2)):
        options = ("--trace", "trace.npz", "--json", "run.json", "--forwards", 200)
        done = place_run(tmp_path, f"{one}.json", *options, "--then", f"{other}.json")
        assert done.returncode == 0, done.stderr
        moved = json.loads((tmp_path / "run.json").read_text())["migration"]
        assert (moved["missed"], moved["forwards"]) == (0, 200)
        assert moved["error"] < 1e-6
        assert {name: moved[name] for name in moved["planned"]} == moved["planned"]


@pytest.mark.slow
def test_plans_and_a_migration_are_carried_out_on_processes(trace, tmp_path):
    trace.save(tmp_path / "trace.npz")
    shuffled = np.stack([np.random.default_rng(layer).permutation(E) for layer in range(L)])
    plans = {
        "shuffled": plan_of(shuffled, 2),
        "copies": plan_of(np.hstack([shuffled, shuffled[:, 2:4]]), 2),
        "nearest": plan_of(np.hstack([shuffled, shuffled[:, 2:4]]), 2, "nearest"),
        "quota": plan_of(np.hstack([shuffled, shuffled[:, 2:4]]), 2, "quota"),
    }
    for name, plan in plans.items():
        plan.save(tmp_path / f"{name}.json")
    plan_of(shuffled[:, np.arange(E) // 2 + np.arange(E) % 2 * (E // 2)], 2).save(tmp_path / "other.json")
    files = [f"{name}.json" for name in plans]
    options = ("--trace", "trace.npz", "--against", "contiguous", "--json", "run.json")
    done = place_run(tmp_path, *files, *options, "--then", "other.json", "--forwards", 6, "--stay", 0)
    assert done.returncode == 0, done.stderr
    assert "0 missed" in done.stdout
    found = json.loads((tmp_path / "run.json").read_text())
    assert found["processes"] == 2
    assert set(found["plans"]) == {*files, "contiguous"}
    for name, report in found["plans"].items():
        assert report["is_equal"], name
        counted = report["counted"]
        assert counted["remote_rows"] == report["predicted"]["remote_rows"]
        # D = 64 floats there and back, an id and a weight of 4 bytes for each of K slots
        assert counted["remote_bytes"] == counted["remote_rows"] * (2 * 4 * 64 + K * 8)
        assert report["largest_error"] < 1e-6
        if name in ("shuffled.json", "contiguous"):
            assert counted["gpu_fanout"] == pytest.approx(report["scored"]["gpu_fanout"], abs=1e-12)
            assert counted["balancedness"] == pytest.approx(report["scored"]["balancedness"], abs=1e-12)
    for name, report in found["plans"].items():
        stayed = report["staying"]
        assert stayed["is_equal"], name
        assert stayed["error"] < 1e-6
        assert stayed["home_after"][-1] == L - 1
        # bytes decide: a row to experts has K ids and weights more than a partial sum
        assert stayed["staying"]["counted"]["bytes"] <= stayed["home"]["counted"]["bytes"]
        assert stayed["home"]["counted"]["rows"] == 2 * report["counted"]["remote_rows"] or "shuffled" not in name
    assert any(report["staying"]["staying"]["counted"]["moves"] for report in found["plans"].values())
    moved = found["migration"]
    assert (moved["missed"], moved["forwards"] > moved["rounds"] > 0) == (0, True)
    assert moved["error"] < 1e-6
    assert {name: moved[name] for name in moved["planned"]} == moved["planned"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("plan.json", "--trace", "trace.npz", "--processes", "2"), "the plans are for 3 GPUs"),
        (("plan.json", "--trace", "none.npz"), "no such file"),
        (("plan.json", "--trace", "trace.npz", "--rows", "5"), "must look like 0:20000"),
        (("plan.json", "--trace", "trace.npz", "--rows", "90:"), "no rows left"),
        (("small.json", "--trace", "trace.npz"), "the trace has 2 layers of 12 experts, a plan 1 of 12"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_process_starts(
    run, trace, tmp_path, monkeypatch, capfd, arguments, message
):
    monkeypatch.chdir(tmp_path)
    trace.save("trace.npz")
    plan_of([list(range(E))] * L, 3).save("plan.json")
    plan_of([list(range(E))], 3).save("small.json")
    assert run("place", "run", *arguments) == 2
    assert message in " ".join(capfd.readouterr().err.split())
