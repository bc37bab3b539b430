"""SRP, SCH, batches that share experts, slots per layer: by hand, against brute force, and their bounds."""

from itertools import permutations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.capacities import lru_hits_LC, spread_by_gain
from offload.locality import segment_cache_hits, segment_routing
from offload.reschedule import experts_touched, form_batches, in_order, signatures
from offload.simulate import simulate
from routing.traces import RoutingTrace


def _trace(expert_TLK, sequences=None, num_experts=None):
    expert_TLK = np.asarray(expert_TLK, np.int16)
    sequence_T = np.zeros(len(expert_TLK), np.int32) if sequences is None else np.asarray(sequences, np.int32)
    metadata = {} if num_experts is None else {"num_experts": num_experts}
    return RoutingTrace(expert_TLK=expert_TLK, sequence_T=sequence_T, metadata=metadata)


@pytest.fixture
def random_trace():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(120, 2, 8)) + np.repeat(rng.normal(size=(6, 2, 8)), 20, axis=0) * 2
    return _trace(np.argsort(-scores, axis=-1)[:, :, :2], np.repeat(np.arange(4), 30), 8)


def test_srp_of_constant_routing_is_one():
    result = segment_routing(_trace([[[0, 1]]] * 10, num_experts=6), 4)
    assert (result.f1, result.cache_ratio) == (1.0, 1.0)


def test_srp_by_hand():
    """Windows (0, 1) and (1, 1): keeping f >= 1 keeps 3 sets: F1 = 2*4/(2*3+4); f >= 2 keeps 1: 2*2/(2*1+4)."""
    result = segment_routing(_trace([[[0]], [[1]], [[1]]]), 2)
    assert result.f1 == pytest.approx(8 / 10)
    assert (result.threshold, result.cache_ratio) == (1, 1.5)


@pytest.mark.parametrize("window", [2, 5, 16])
def test_srp_optimum_satisfies_its_equation(random_trace, window):
    result = segment_routing(random_trace, window)
    assert 0 < result.f1 <= 1
    assert abs(result.threshold - window / 2 * result.f1) <= 1


def test_windows_do_not_cross_sequences():
    with pytest.raises(ValueError, match="no sequence of this trace has 3 tokens"):
        segment_routing(_trace([[[0]], [[1]], [[0]], [[1]]], [0, 0, 1, 1]), 3)


def test_sch_grows_with_the_cache_and_with_what_it_knows(random_trace):
    rates = [segment_cache_hits(random_trace, ratio, 16) for ratio in (1, 2, 3, 4)]
    assert rates == sorted(rates)
    assert segment_cache_hits(random_trace, 2, None) >= segment_cache_hits(random_trace, 2, 16) - 1e-9
    everything = segment_cache_hits(random_trace, 4, None)
    assert everything == pytest.approx(1 - 16 / (120 * 4))


def test_sch_by_hand():
    """Room for one, experts 0 1 0 0: the 1, never used again, leaves at once, so both later 0 hit."""
    assert segment_cache_hits(_trace([[[0]], [[1]], [[0]], [[0]]]), 1, None) == 0.5


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sets(st.integers(0, 5), min_size=1, max_size=3), min_size=4, max_size=4))
def test_batches_are_no_worse_than_in_order_and_near_the_best(sets):
    signature = np.zeros((4, 6), bool)
    for row, members in enumerate(sets):
        signature[row, list(members)] = True
    batches = form_batches(signature, 2)
    assert sorted(prompt for batch in batches for prompt in batch) == [0, 1, 2, 3]
    cost = sum(experts_touched(signature, batches))
    assert cost <= sum(experts_touched(signature, in_order(4, 2)))
    best = min(sum(experts_touched(signature, [order[:2], order[2:]])) for order in permutations(range(4)))
    assert cost == best


def test_batches_gather_prompts_of_a_kind():
    sequences = np.repeat(np.arange(6), 3)
    trace = _trace(
        [[[group * 4 + token % 4]] for group, token in zip((sequences % 2).tolist(), range(18), strict=True)],
        sequences,
        8,
    )
    signature = signatures(trace)
    assert signature.shape == (6, 8)
    assert sum(experts_touched(signature, form_batches(signature, 3))) < sum(experts_touched(signature, in_order(6, 3)))


def test_lru_curve_equals_the_simulation(random_trace):
    hits = lru_hits_LC(random_trace)
    for capacity in (2, 5, 8):
        simulated = simulate(random_trace, capacity, policies=["lru"])["lru"]
        assert hits[:, capacity].tolist() == simulated.hits_L.tolist()


@settings(max_examples=50)
@given(st.lists(st.lists(st.integers(0, 9), min_size=4, max_size=4), min_size=3, max_size=3), st.integers(3, 12))
def test_slots_by_gain_are_the_best_for_concave_curves(gains, total):
    hits = np.array([[0, *np.cumsum(sorted(row, reverse=True))] for row in gains])
    slots = spread_by_gain(hits, total, [1, 1, 1])
    assert sum(slots) <= total
    best = max(
        sum(hits[layer, count] for layer, count in enumerate(counts))
        for counts in product(range(1, 5), repeat=3)
        if sum(counts) <= total
    )
    assert sum(hits[layer, count] for layer, count in enumerate(slots)) == best
