"""Imbalance batch by batch: hand-computed batches, dispatch programmes against brute force, the search for the tail."""

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement import Cluster, Problem, generate_trace, solve
from placement.data.suspicion import gini_L, has_domains, planning_notes
from placement.heuristics.baselines import biased_counts_LE
from placement.objectives.batches import (
    batch_imbalance,
    imbalance_A,
    least_peak_G,
    loads_AG,
    static_share_EG,
)
from placement.search.batches import search_tail
from routing.traces import RoutingTrace


def traced(rows, experts=4):
    return RoutingTrace(
        expert_TLK=np.array(rows, np.int16)[:, None, :],
        sequence_T=np.zeros(len(rows), np.int32),
        metadata={"num_experts": experts},
    )


def test_balanced_on_average_and_not_in_any_batch():
    """The first batch uses experts 0 and 1, on GPU 0; the second 2 and 3, on GPU 1: 2.0 in each, 1.0 in all."""
    trace = traced([[0, 1]] * 4 + [[2, 3]] * 4)
    plan = solve(Problem.from_trace(trace, Cluster.grid(1, 2)), solver="contiguous")
    found = batch_imbalance(plan, trace, 4)
    assert (found.mean, found.p95, found.worst, found.batches) == (2.0, 2.0, 2.0, 2)
    assert batch_imbalance(plan, trace, 8).mean == 1.0


def test_shared_experts_fill_the_emptiest_gpus():
    load_AG, speed_G = np.array([[6.0, 2.0]]), np.ones(2)
    assert imbalance_A(load_AG, speed_G, 0, fills=False) == pytest.approx(6 / 4)
    assert imbalance_A(load_AG, speed_G, 4, fills=False) == pytest.approx(8 / 6)
    assert imbalance_A(load_AG, speed_G, 4, fills=True) == pytest.approx(1.0)
    assert imbalance_A(load_AG, speed_G, 2, fills=True) == pytest.approx(6 / 5)


def test_static_sources_use_one_copy_each():
    """Expert 0 has copies on GPUs 0 and 2 of two nodes; each GPU uses its node's."""
    copies_EG = np.array([[1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 1]], np.int16)
    share_EG = static_share_EG(copies_EG, Cluster.grid(2, 2))
    assert share_EG.tolist() == [[0.5, 0, 0.5, 0], [0, 1, 0, 0], [0, 0, 0, 1]]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_the_dispatch_programme_is_least_and_below_every_other_rule(seed):
    """By the cut bound: no set of GPUs gets less than the experts that live on it alone; the worst set is tight."""
    draw = np.random.default_rng(seed)
    copies_EG = (draw.random((5, 3)) < 0.5).astype(np.int16)
    copies_EG[np.arange(5), draw.integers(3, size=5)] = 1
    rows_E, cluster = draw.integers(0, 20, size=5).astype(float), Cluster.grid(1, 3)
    load_G = least_peak_G(copies_EG, rows_E, cluster.speed_G)
    assert load_G.sum() == pytest.approx(rows_E.sum())
    cuts = [
        rows_E[(copies_EG[:, [g for g in range(3) if g not in chosen]] == 0).all(axis=1)].sum() / len(chosen)
        for size in (1, 2, 3)
        for chosen in itertools.combinations(range(3), size)
    ]
    assert load_G.max() == pytest.approx(max(cuts), abs=1e-6)
    for policy in ("uniform", "static", "nearest"):
        assert loads_AG(copies_EG, cluster, rows_E[None], policy).max() >= load_G.max() - 1e-6


@pytest.mark.parametrize("seed", range(4))
def test_the_search_for_the_tail_never_makes_it_worse(seed):
    trace = generate_trace(tokens=400, layers=1, experts=8, top_k=2, blocks=4, tokens_per_sequence=25, seed=seed)
    problem = Problem.from_trace(trace, Cluster.grid(1, 4), replicas=4)
    plans = {
        objective: solve(problem, objective=objective, solver="search", time_limit_s=3, processes=1)
        for objective in ("balance", "batches")
    }
    tails = {name: solve_tail(plan, problem) for name, plan in plans.items()}
    assert tails["batches"] <= tails["balance"] * 1.02
    assert plans["batches"].certificate.bound <= plans["batches"].certificate.objective


def solve_tail(plan, problem):
    from placement import OBJECTIVES, evaluate

    return evaluate(OBJECTIVES["batches"], plan, problem)


def test_the_tail_is_found_by_hand():
    """Batches of expert 0 or of expert 1 alone; the copy of expert 2, used in none, goes to one of them."""
    rows_AE = np.array([[8.0, 0, 0], [8, 0, 0], [0, 6, 0], [0, 6, 1]])
    map_P = search_tail(rows_AE, np.array([0, 1, 2, 2]), np.ones(4), time.monotonic() + 5)
    assert sorted(map_P.tolist()) in ([0, 0, 1, 2], [0, 1, 1, 2])


@given(
    slots=st.integers(0, 20),
    gpus=st.integers(1, 5),
    experts=st.integers(1, 6),
)
def test_biased_counts_use_every_slot(slots, gpus, experts):
    total = min(experts + slots, experts * gpus)
    load_LE = np.random.default_rng(slots).random((2, experts))
    count_LE = biased_counts_LE(load_LE, total, gpus)
    if gpus > 1:
        assert (count_LE.sum(axis=1) == total).all()
    assert count_LE.min() >= 1
    assert count_LE.max() <= gpus


def test_signs_of_data_that_do_not_hold():
    even, real = np.ones((2, 16)), np.random.default_rng(0).lognormal(0, 0.8, (2, 16))
    assert gini_L(even) == pytest.approx(0)
    assert gini_L(np.eye(1, 16)) == pytest.approx(15 / 16)
    assert "looks synthetic" in planning_notes({"random": even}, is_broad=True)[0]
    assert "add a decode load" in planning_notes({"prefill_a": real, "prefill_b": real}, is_broad=True)[0]
    assert planning_notes({"prefill_a": real, "decode_b": real}, is_broad=True) == []
    assert "planned on one workload" in planning_notes({"loads": real}, is_broad=False)[0]


def test_one_sequence_is_one_domain():
    trace = generate_trace(tokens=40, layers=1, experts=8, top_k=2, blocks=2, tokens_per_sequence=20)
    assert has_domains([trace])
    assert not has_domains([trace.rows(0, 20)])
    assert not has_domains([None])
    assert has_domains([None, None])
