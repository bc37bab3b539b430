import itertools
from functools import partial

import numpy as np
import pytest

from placement import Cluster, Problem, score, solve
from placement.data.generators import generate_trace
from placement.objectives.dispatch import nearest_share_EG, quota_share_EG, share_EG, uniform_share_EG
from placement.objectives.fanout import gpu_fanout, node_fanout
from placement.objectives.hops import hop_share
from routing.traces import RoutingTrace


@pytest.fixture
def make_trace():
    return partial(generate_trace, tokens=400, layers=3, experts=16, top_k=2, blocks=4, tokens_per_sequence=20)


def test_fanout_by_hand():
    trace = RoutingTrace(
        expert_TLK=np.array([[[0, 1]], [[0, 3]], [[2, -1]], [[-1, -1]]], np.int16),
        sequence_T=np.arange(4, dtype=np.int32),
        metadata={"num_experts": 4},
    )
    plan = solve(Problem.from_trace(trace, Cluster.grid(2, 1)), solver="contiguous")
    assert gpu_fanout(plan, trace) == pytest.approx((1 + 2 + 1) / 3)
    assert node_fanout(plan, trace) == pytest.approx((1 + 2 + 1) / 3)


def brute_fanout(plan, trace, part_G):
    """Mean over all ways in which the replicas of a token's experts can be chosen."""
    per_layer = []
    for layer in range(plan.num_layers):
        places = {e: [] for e in range(plan.num_experts)}
        for slot, e in enumerate(plan.physical_to_logical_LP[layer].tolist()):
            places[e].append(part_G[slot // plan.slots_per_gpu])
        rows = trace.expert_TLK[:, layer].tolist()
        per_token = [
            np.mean([len(set(choice)) for choice in itertools.product(*(places[e] for e in set(row)))]) for row in rows
        ]
        per_layer.append(np.mean(per_token))
    return np.mean(per_layer)


@pytest.mark.parametrize("replicas", [0, 8, 16])
def test_fanout_equals_enumeration(make_trace, replicas):
    trace = make_trace(tokens=60, top_k=3)
    plan = solve(Problem.from_trace(trace, Cluster.grid(2, 4), replicas=replicas), solver="random", seed=3)
    assert gpu_fanout(plan, trace) == pytest.approx(brute_fanout(plan, trace, np.arange(8)))
    assert node_fanout(plan, trace) == pytest.approx(brute_fanout(plan, trace, plan.cluster.node_G))


def test_nearest_share_is_the_mean_over_sources():
    random = np.random.default_rng(0)
    cluster = Cluster.grid(3, 3)
    copies_EG = (random.random((10, 9)) < 0.25).astype(np.int16)
    copies_EG[copies_EG.sum(axis=1) == 0, 4] = 1
    mean = np.mean([nearest_share_EG(copies_EG, cluster, source) for source in range(9)], axis=0)
    np.testing.assert_allclose(share_EG(copies_EG, cluster, "nearest", np.ones(10)), mean, atol=1e-12)


def test_quota_levels_what_equal_shares_cannot():
    copies_EG = np.array([[1, 1], [1, 0]], np.int16)
    load_E = np.array([10.0, 6.0])
    np.testing.assert_allclose(load_E @ quota_share_EG(copies_EG, load_E, np.ones(2)), [8, 8])
    assert (load_E @ uniform_share_EG(copies_EG)).max() == 11


def test_score_on_other_data_and_hops(make_trace):
    other = make_trace(seed=1)
    plan = solve(Problem.from_trace(make_trace(seed=0), Cluster.grid(2, 4)), solver="contiguous")
    found = score(Problem.from_trace(other, plan.cluster), plan)
    assert 0 < found.balancedness <= 1
    gpu_TL = other.expert_TLK[:, :, 0] // 2
    assert hop_share(plan, other) == pytest.approx((gpu_TL[:, 1:] != gpu_TL[:, :-1]).mean())


def test_speed_counts_in_balance():
    spec = {"node_types": {"n": {"gpus": {"count": 2}}}, "nodes": [{"type": "n", "gpus": {0: {"speed": 0.5}}}]}
    plan = solve(Problem.from_loads(np.ones((1, 8)), Cluster.from_mapping(spec)))
    assert plan.certificate.objective == pytest.approx((4 / 0.5) / (8 / 1.5))
