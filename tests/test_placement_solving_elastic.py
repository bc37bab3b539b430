import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement import Cluster, Problem, solve
from placement.objectives.churn import churn
from placement.solving.elastic import Drop, Transfer, match_gpus, migrate, replay


def random_plan(gpus, replicas, seed, nodes=1):
    load = np.random.default_rng(seed).lognormal(0, 1, (2, 12))
    problem = Problem.from_loads(load, Cluster.grid(nodes, gpus // nodes), replicas=replicas)
    return solve(problem, solver="random", seed=seed)


@settings(max_examples=25, deadline=None)
@given(sizes=st.sampled_from([(4, 4), (4, 6), (6, 4), (2, 12), (12, 3)]), seed=st.integers(0, 500))
def test_every_expert_stays_live_and_the_steps_end_at_the_target(sizes, seed):
    current, target = random_plan(sizes[0], 0, seed), random_plan(sizes[1], 12, seed + 1)
    migration = migrate(current, target, expert_bytes=10.0)
    live = [count for _, count in replay(current, migration)]
    assert min(live, default=1) >= 1
    transfers = [step for step in migration.steps if isinstance(step, Transfer)]
    assert migration.moved_bytes == 10 * len(transfers) == churn(current, migration.plan, 10.0).moved_bytes
    assert migration.moved_bytes <= churn(current, target, 10.0).moved_bytes


def test_no_replicas_at_all_needs_one_spare_slot():
    current = random_plan(4, 0, 0)
    migration = migrate(current, random_plan(4, 0, 1), expert_bytes=1.0)
    assert list(replay(current, migration))
    assert migration.peak_extra_bytes <= 1


def test_renumbering_finds_the_same_plan_again():
    plan = random_plan(4, 0, 0, nodes=2)
    order = [3, 2, 0, 1]
    slots = plan.physical_to_logical_LP.reshape(2, 4, -1)[:, order].reshape(2, -1)
    from dataclasses import replace

    shuffled = replace(plan, physical_to_logical_LP=slots)
    assert churn(plan, match_gpus(plan, shuffled), 1.0).moved_copies == 0
    assert not [step for step in migrate(plan, shuffled, 1.0).steps if isinstance(step, Transfer | Drop)]


def test_other_models_are_refused():
    with pytest.raises(ValueError, match="different models"):
        migrate(random_plan(4, 0, 0), solve(Problem.from_loads(np.ones((1, 12)), Cluster.grid(1, 4)), solver="lpt"))
