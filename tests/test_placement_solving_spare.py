"""Slots that stay free: counted in memory, filled later without moving anything, used by migrations."""

from dataclasses import replace

import numpy as np
import pytest

from placement import Cluster, Plan, Problem, solve
from placement.checking.check import check_plan
from placement.contract.spec import ModelSpec
from placement.objectives.churn import churn
from placement.solving.chunks import cut, stop_after
from placement.solving.cluster_tiers import solve_cluster_tiers
from placement.solving.elastic import Transfer, migrate_checked
from tests.test_placement_tiers import cluster as tier_cluster
from tests.test_placement_tiers import problem as tier_problem


def machines(spare, memory="10MB", nodes=1):
    """Four GPUs of ten megabytes: ten experts of half a megabyte in each of two layers."""
    return Cluster.from_mapping(
        {
            "model": {"expert_bytes": 5e5},
            "gpu_types": {"g": {"memory": memory}},
            "node_types": {"n": {"gpus": {"count": 4 // nodes}}},
            "nodes": [{"type": "n", "count": nodes}],
            "ep": {"spare_slots": spare},
        }
    )


def loads(seed=0, experts=32):
    return np.random.default_rng(seed).lognormal(0, 1, (2, experts))


def test_memory_counts_spare_slots_and_the_plan_keeps_their_number(tmp_path):
    """Eight experts on each of four GPUs, and two slots beside them: ten fit, eleven do not."""
    plan = solve(Problem.from_loads(loads(), machines(2)), solver="lpt")
    plan.save(tmp_path / "p.json")
    assert Plan.load(tmp_path / "p.json").cluster.ep.spare_slots == 2
    with pytest.raises(ValueError, match=r"8 slots and 3 spare ones x 2 layers .* 7 slots fit: use at least 5 GPUs"):
        Problem.from_loads(loads(), machines(3))
    tampered = replace(plan, cluster=machines(3))
    assert "GPU 0 needs" in check_plan(tampered, Problem.from_loads(loads(), machines(0)))[0]


def test_filling_moves_nothing_and_sends_only_copies():
    running = solve(Problem.from_loads(loads(0), machines(2)), solver="search", time_limit_s=1)
    later = Problem.from_loads(loads(1), machines(0), replicas=8)
    plan = solve(replace(later, current=running), solver="fill")
    assert check_plan(plan, made_from=later) == []
    assert (plan.copies_LEG >= running.copies_LEG).all()
    assert plan.copies_LEG.max() == 1
    assert churn(running, plan).moved_copies == 2 * 8
    kept = solve(Problem.from_loads(loads(1), machines(0)), solver="contiguous")
    before = replace(kept, physical_to_logical_LP=running.physical_to_logical_LP)
    found = [one.certificate.objective for one in (plan, solve(later, solver="search", time_limit_s=1))]
    assert found[1] - 1e-9 <= found[0] < imbalance_of(before, later)
    steps = migrate_checked(running, plan)
    assert all(isinstance(step, Transfer) for step in steps.steps)
    assert steps.peak_extra_bytes == 0


def imbalance_of(plan, problem):
    from placement.objectives import evaluate, find_objective

    return evaluate(find_objective("balance"), plan, problem)


def test_each_copy_goes_where_an_exhaustive_look_would_put_it():
    """One GPU more room: of all places for one copy, none is better than the one chosen, hottest expert first."""
    load = np.array([[8.0, 3, 2, 1]])
    one = Cluster.grid(1, 2, spare_slots=1)
    running = replace(solve(Problem.from_loads(load, one), solver="contiguous"), cluster=one)
    later = replace(Problem.from_loads(load, Cluster.grid(1, 2), replicas=2), current=running)
    map_LP = solve(later, solver="fill").physical_to_logical_LP
    # expert 0 (8) lies on GPU 0 and comes to GPU 1; then 4, 4, 3, 2, 1: expert 2 is the hottest that GPU 0 lacks
    assert map_LP.tolist() == [[0, 1, 2, 2, 3, 0]]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"replicas": 12}, "has 8 slots on each GPU and leaves 2 free; 11 are asked for: use --replicas 4 to 8"),
        ({"replicas": 0}, "8 are asked for"),
    ],
)
def test_what_cannot_be_filled_is_refused(change, words):
    running = solve(Problem.from_loads(loads(), machines(2)), solver="lpt")
    later = Problem.from_loads(loads(), Cluster.grid(1, 4), **change)
    with pytest.raises(ValueError, match=words):
        solve(replace(later, current=running), solver="fill")


def test_migrations_receive_into_spare_slots():
    """Without spare slots a circle of single copies needs room for one expert more; with one it needs none."""
    for spare in (0, 1):
        problem = Problem.from_loads(np.ones((1, 4)), machines(spare))
        one = solve(problem, solver="contiguous")
        size = ModelSpec(expert_bytes=5e5).bytes_per_expert
        other = replace(one, physical_to_logical_LP=np.array([[1, 2, 3, 0]]), cluster=tied(one.cluster))
        one = replace(one, cluster=other.cluster)
        found = migrate_checked(one, other)
        assert found.peak_extra_bytes == (0 if spare else size)
        assert stop_after(one, found, cut(one, found, most_bytes=1)).peak_extra_bytes == (0 if spare else size)


def tied(cluster):
    """GPUs of different speeds keep their numbers, so that there is something to move."""
    return replace(cluster, speed_G=np.array([1.0, 1.1, 1.2, 1.3]))


def test_tiers_leave_spare_slots_of_gpus_free():
    for spare, most in ((0, 6), (1, 3)):
        asked = tier_problem(tier_cluster(nodes=1, gpus=1, slots=(6, 9, 30)), layers=3, experts=8)
        asked = replace(
            asked, cluster=replace(asked.cluster, ep=asked.cluster.ep.model_copy(update={"spare_slots": spare}))
        )
        plan = solve_cluster_tiers(asked, solver="search", time_limit_s=1)
        assert check_plan(plan, made_from=asked) == []
        assert plan.copies_LEG.sum() == most
