import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

from placement import Cluster, Problem, score, solve
from placement.checking.check import check_plan
from placement.data.generators import generate_trace
from placement.objectives.fanout import gpu_fanout
from placement.run.blocks import MAX_GPUS, one_block


@pytest.fixture
def wide():
    load = np.random.default_rng(0).lognormal(0, 1, (2, 16))
    return Problem.from_loads(load, Cluster.grid(1250, 8), replicas=9984)


@pytest.mark.parametrize(
    "objective", ["balance", *(pytest.param(name, marks=pytest.mark.slow) for name in ("activated", "latency"))]
)
def test_ten_thousand_gpus_are_planned_by_blocks(wide, objective):
    model = {"hidden": 64, "moe_intermediate": 32, "top_k": 2}
    problem = replace(wide, cluster=Cluster.grid(1250, 8, model=model))
    tracemalloc.start()
    plan = solve(problem, objective=objective, time_limit_s=20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert check_plan(plan, made_from=problem) == []
    assert peak < 256 << 20
    assert score(problem, plan, "balance").balancedness > 0.9
    block, blocks = one_block(problem, pairs=False)
    assert block.num_gpus <= MAX_GPUS
    first, second = plan.physical_to_logical_LP.reshape(2, blocks, -1)[:, :2].swapaxes(0, 1)
    np.testing.assert_array_equal(first, second)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["fanout+balance", "hops"])
def test_ten_thousand_gpus_and_tokens(objective):
    trace = generate_trace(tokens=300, layers=2, experts=16, top_k=2, blocks=4, tokens_per_sequence=5)
    problem = Problem.from_trace(trace, Cluster.grid(1250, 8), replicas=9984)
    plan = solve(problem, objective=objective, time_limit_s=5, processes=1)
    assert check_plan(plan, made_from=problem) == []
    assert plan.certificate.in_sample["gpu_fanout"] <= 2


def test_fanout_of_many_alike_gpus_equals_that_of_few():
    trace = generate_trace(tokens=60, layers=1, experts=8, top_k=3, blocks=4, tokens_per_sequence=10)
    plan = solve(Problem.from_trace(trace, Cluster.grid(80, 8), replicas=640 * 2 - 8), solver="round-robin")
    copies_EG = plan.copies_LEG[0]
    share_EG = copies_EG / copies_EG.sum(axis=1, keepdims=True)
    expected = np.mean([(1 - np.prod(1 - share_EG[row], axis=0)).sum() for row in trace.expert_TLK[:, 0]])
    assert gpu_fanout(plan, trace) == pytest.approx(expected)


def test_too_many_gpus_are_refused_with_the_reason():
    load = np.random.default_rng(0).lognormal(0, 1, (1, 16))
    prime = Problem.from_loads(load, Cluster.grid(10007, 1), replicas=10007 - 16)
    with pytest.raises(ValueError, match="no number of GPUs from 16 to 2048 divides 10007 into equal blocks"):
        solve(prime)
    slow = {
        "node_types": {"n": {"gpus": {"count": 8}}},
        "nodes": [{"type": "n", "count": 1249}, {"type": "n", "speed": 0.5}],
    }
    uneven = Problem.from_loads(load, Cluster.from_mapping(slow), replicas=9984)
    with pytest.raises(ValueError, match=r"blocks are not alike .* set ep\.size to 2048 or less"):
        solve(uneven)
    many = Problem.from_loads(np.ones((1, 4096)), Cluster.grid(512, 8))
    with pytest.raises(ValueError, match="a block of 4096 GPUs or more is needed"):
        solve(many)
    fit = Problem.from_loads(load, Cluster.grid(1250, 8), replicas=9984)
    for solver, words in (("ilp", "binaries"), ("lns", "at most 3072 slots")):
        with pytest.raises(ValueError, match=words):
            solve(fit, solver=solver, time_limit_s=5)
