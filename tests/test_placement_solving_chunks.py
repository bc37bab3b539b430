"""Migrations in chunks: within the budget, every state between two chunks valid, the most useful layers first."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from placement import Cluster, Plan, Problem, solve
from placement.checking.check import check_plan
from placement.cli import app
from placement.objectives.balance import imbalance_L
from placement.solving.chunks import cut, stop_after
from placement.solving.elastic import Drop, Transfer, migrate, replay
from placement.solving.exchanges import exchanges, plan_after

MODEL = {"expert_bytes": 1e6}


@pytest.fixture
def plans():
    draw = np.random.default_rng(0)
    before, after = draw.lognormal(0, 1, (2, 5, 16))
    cluster = Cluster.grid(2, 2, model=MODEL)
    return [solve(Problem.from_loads(load, cluster, replicas=8), solver="eplb-global") for load in (before, after)]


@pytest.mark.parametrize(
    ("most_bytes", "most_seconds"), [(3e6, np.inf), (np.inf, 4e-5), (1.0, np.inf), (np.inf, np.inf)]
)
def test_chunks_keep_the_budget_and_every_state_is_valid(plans, most_bytes, most_seconds):
    current, target = plans
    migration = migrate(current, target)
    chunks = cut(current, migration, most_bytes=most_bytes, most_seconds=most_seconds)
    for chunk in chunks:
        moved = [step for step in chunk.steps if isinstance(step, Transfer)]
        assert chunk.bytes == len(moved) * 1e6
        is_one = sum(one.moves > 0 for one in chunk.exchanges) == 1
        assert is_one or (chunk.bytes <= most_bytes and chunk.seconds <= most_seconds * 1.0001)
    steps = [step for chunk in chunks for step in chunk.steps]
    moved = [step for step in steps if isinstance(step, Transfer)]
    assert len(moved) * 1e6 == migration.moved_bytes
    reordered = type(migration)(**{**vars(migration), "steps": steps})
    assert all(count >= 1 for _, count in replay(current, reordered))
    if most_bytes == most_seconds == np.inf:
        assert len(chunks) == 1


def test_the_layer_that_gains_most_per_copy_comes_first():
    """Layer 0 is balanced by its plan already; layer 1 is not, and comes first."""
    cluster = Cluster.grid(1, 2, model=MODEL)
    load = np.array([[4.0, 1, 4, 1], [4, 4, 1, 1]])
    problem = Problem.from_loads(load, cluster)
    current = solve(problem, solver="contiguous")
    target = solve(problem, solver="search", time_limit_s=1, processes=1)
    first = cut(current, migrate(current, target), most_bytes=1e6)[0]
    assert {step.layer for step in first.steps} == {1}


def test_budgets_and_sizes_are_checked(plans):
    current, target = plans
    migration = migrate(current, target)
    with pytest.raises(ValueError, match="budget must be positive"):
        cut(current, migration, most_bytes=0)
    unknown = [
        solve(Problem.from_loads(np.ones((1, 4)), Cluster.grid(1, 2)), solver=name) for name in ("contiguous", "random")
    ]
    with pytest.raises(ValueError, match=r"chunks need model\.expert_bytes"):
        cut(unknown[0], migrate(*unknown))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), gpus=st.sampled_from([2, 4]), extra=st.integers(0, 2), doubles=st.booleans())
def test_every_state_between_exchanges_is_a_plan(seed, gpus, extra, doubles):
    """Any two plans, also with two copies of an expert on one GPU: no expert is lost, and the end is the target."""
    draw = np.random.default_rng(seed)
    cluster = Cluster.grid(2, gpus // 2, model=MODEL)
    current, target = (random_plan(draw, cluster, extra * gpus, doubles=doubles) for _ in range(2))
    found = exchanges(current, target)
    for count in range(len(found) + 1):
        assert check_plan(plan_after(current, found[:count], target)) == []
    assert (plan_after(current, found, target).copies_LEG == target.copies_LEG).all()
    missing = (target.copies_LEG > 0) & (current.copies_LEG == 0)
    assert sum(one.moves for one in found) == missing.sum()  # each expert is sent once to where it is missing
    whole = migrate(current, target)
    steps = [step for one in found for step in one.steps]
    assert len(list(replay(current, replace(whole, plan=target, steps=steps)))) == len(steps)
    assert most_above_slots(current, steps) <= 1


def random_plan(draw, cluster, replicas, *, doubles):
    experts, gpus = 8, cluster.num_gpus
    rows = []
    for _ in range(2):
        row = np.concatenate([np.arange(experts), draw.choice(experts, replicas, replace=doubles)])
        rows.append(draw.permutation(row))
    load = draw.lognormal(0, 1, (2, experts))
    plan = solve(Problem.from_loads(load, cluster, replicas=replicas), solver="eplb-global")
    return replace(plan, physical_to_logical_LP=np.array(rows).reshape(2, gpus * (experts + replicas) // gpus))


def most_above_slots(current, steps):
    """Largest number of experts beyond its slots that a GPU holds after any step."""
    held = (current.copies_LEG > 0).sum(axis=1)
    most = 0
    for step in steps:
        is_transfer = isinstance(step, Transfer)
        held[step.layer, step.target if is_transfer else step.gpu] += 1 if is_transfer else -1
        most = max(most, int(held.max()) - current.slots_per_gpu)
    return most


def test_gains_are_those_of_the_plans(plans):
    """Gains sum to the fall of the imbalance, by the objective's own code; the steep ones are first."""
    current, target = plans
    found = exchanges(current, target)
    load_LE = np.array(target.metadata["load"])
    for count in (0, 1, len(found) // 2, len(found)):
        before, after = (imbalance_L(plan, load_LE) for plan in (current, plan_after(current, found[:count], target)))
        assert sum(one.gain for one in found[:count]) == pytest.approx(float((before - after).sum()))
    half = sum(one.moves for one in found) / 2
    moves = np.cumsum([one.moves for one in found])
    gains = np.cumsum([one.gain for one in found])
    assert gains[np.searchsorted(moves, half)] > 0.7 * gains[-1]


def test_a_swap_and_a_lone_copy_by_hand():
    """GPU 0 gives 0 and gets 2, GPU 1 the other way: one exchange of two moves. A second copy of 0 moves alone."""
    cluster = Cluster.grid(1, 2, model=MODEL)
    plan = solve(Problem.from_loads(np.array([[4.0, 3, 2, 1]]), cluster), solver="contiguous")
    target = replace(plan, physical_to_logical_LP=np.array([[2, 1, 0, 3]]))
    (swap,) = exchanges(plan, target)
    assert swap.steps == [
        *(Transfer(0, 2, 1, 0, False), Drop(0, 2, 1), Transfer(0, 0, 0, 1, False), Drop(0, 0, 0)),
    ]
    assert swap.gain == pytest.approx(7 / 5 - 5 / 5)
    copied, other = (
        replace(plan, physical_to_logical_LP=np.array([row])) for row in ([0, 1, 2, 0, 3, 1], [0, 1, 2, 0, 3, 2])
    )
    (lone,) = exchanges(copied, other)
    assert lone.steps == [Drop(0, 1, 1), Transfer(0, 2, 0, 1, False)]


def test_other_slots_are_refused(plans):
    current, target = plans
    fewer = solve(Problem.from_loads(np.ones((5, 16)), target.cluster, replicas=4), solver="eplb-global")
    with pytest.raises(ValueError, match="need equal GPUs and slots"):
        exchanges(current, fewer)
    whole = migrate(current, fewer)
    with pytest.raises(ValueError, match="a plan at its end only"):
        stop_after(current, whole, cut(current, whole, most_bytes=4e6)[:1])


def test_the_command_writes_chunks(plans, tmp_path):
    for name, plan in zip(("a", "b"), plans, strict=True):
        plan.save(tmp_path / f"{name}.json")
    arguments = [
        "migrate",
        tmp_path / "a.json",
        tmp_path / "b.json",
        "--out",
        tmp_path / "s.json",
        "--chunk-bytes",
        "4MB",
    ]
    done = CliRunner().invoke(app, [str(one) for one in arguments])
    assert done.exit_code == 0, done.output
    chunks = json.loads((tmp_path / "s.json").read_text())["chunks"]
    assert all(chunk["bytes"] <= 4e6 for chunk in chunks)
    assert f"{len(chunks)} chunks; the longest stalls" in done.output
    arguments += ["--chunks", "2", "--plan-out", tmp_path / "reached.json"]
    done = CliRunner().invoke(app, [str(one) for one in arguments])
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "s.json").read_text())
    assert (len(report["chunks"]), report["moved_bytes"]) == (2, sum(c["bytes"] for c in report["chunks"]))
    assert check_plan(Plan.load(tmp_path / "reached.json")) == []
