import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement import Cluster, Problem, solve
from placement.objectives.churn import churn
from placement.solving.elastic import Drop, Transfer, match_gpus, migrate, replay
from placement.solving.tiers import Machine, choose_tiers, load_machine, place_tiers, tier_seconds


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


MACHINE = Machine(
    gpu_bytes=2.0,
    cpu_bytes=2.0,
    hbm_bytes_per_s=100.0,
    dram_bytes_per_s=10.0,
    pcie_bytes_per_s=5.0,
    ssd_bytes_per_s=1.0,
)


@given(seed=st.integers(0, 200))
def test_tiers_are_optimal_for_equal_sizes(seed):
    use = np.random.default_rng(seed).random((2, 3))
    size = np.ones(2)
    best = min(
        tier_seconds(use, np.array(tiers).reshape(2, 3), MACHINE, size)
        for tiers in itertools.product((0, 1, 2), repeat=6)
        if tiers.count(0) <= 2 and tiers.count(1) <= 2
    )
    assert tier_seconds(use, choose_tiers(use, MACHINE, size), MACHINE, size) == pytest.approx(best)


def test_tier_plan_from_hardware_file(tmp_path):
    path = tmp_path / "hardware.toml"
    path.write_text('[ssd]\nread_bytes_per_s = 2e9\n[ram]\nbytes_per_s = "30GB/s"\n')
    machine = load_machine(path, gpu_memory="2MB", cpu_memory="3MB")
    assert (machine.ssd_bytes_per_s, machine.dram_bytes_per_s) == (2e9, 30e9)
    problem = Problem.from_loads(np.arange(1.0, 9.0)[None], Cluster.grid(1, 1))
    plan = place_tiers(problem, machine, np.array([1e6]))
    assert plan.tier_LE.tolist() == [[2, 2, 2, 1, 1, 1, 0, 0]]
    path.write_text("[ssd]\n")
    with pytest.raises(ValueError, match="no ssd and dram bandwidth"):
        load_machine(path)
