"""Migrations in chunks: within the budget, every state between two chunks valid, the most useful layers first."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from placement import Cluster, Problem, solve
from placement.cli import app
from placement.solving.chunks import cut
from placement.solving.elastic import Transfer, migrate, replay

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
        assert len(moved) <= 1 or (chunk.bytes <= most_bytes and chunk.seconds <= most_seconds * 1.0001)
    steps = [step for chunk in chunks for step in chunk.steps]
    assert sorted(map(repr, steps)) == sorted(map(repr, migration.steps))
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
