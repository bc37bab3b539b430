import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement import Cluster, Problem, solve
from placement.bounds.fanout import fanout_bound_L, least_parts
from placement.data.generators import generate_trace
from placement.objectives.fanout import gpu_fanout, node_fanout


def test_least_parts_by_hand():
    assert least_parts(4, 4, 8, 6) == 1
    assert least_parts(4, 4, 8, 0) == 4
    assert least_parts(4, 2, 8, 9) == 2
    assert least_parts(4, 4, 8, 1) == pytest.approx(3)


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 500), top_k=st.sampled_from([2, 3]))
def test_fanout_bound_is_below_every_plan(seed, top_k):
    trace = generate_trace(tokens=40, layers=1, experts=6, top_k=top_k, blocks=3, tokens_per_sequence=20, seed=seed)
    plan = solve(Problem.from_trace(trace, Cluster.grid(1, 3)), solver="contiguous")
    sets = trace.expert_TLK[:, 0]
    best = min(
        np.mean([len({order.index(int(e)) // 2 for e in row}) for row in sets])
        for order in itertools.permutations(range(6))
    )
    assert 1 <= fanout_bound_L("gpu-fanout", trace, plan)[0][0] <= best + 1e-9


def test_fanout_bound_holds_for_nodes_too():
    trace = generate_trace(tokens=200, layers=2, experts=16, top_k=4, blocks=4, tokens_per_sequence=20)
    for seed in range(10):
        plan = solve(Problem.from_trace(trace, Cluster.grid(2, 4)), solver="random", seed=seed)
        assert fanout_bound_L("gpu-fanout", trace, plan)[0].mean() <= gpu_fanout(plan, trace)
        assert fanout_bound_L("node-fanout", trace, plan)[0].mean() <= node_fanout(plan, trace)
