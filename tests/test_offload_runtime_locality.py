"""Batches that share experts, slots per layer: by hand, against brute force, and their bounds."""

from itertools import permutations, product

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.cache.capacities import spread_by_gain
from offload.serve.batches import experts_touched, form_batches, in_order, signatures
from routing.traces import RoutingTrace


def _trace(expert_TLK, sequences, num_experts):
    return RoutingTrace(
        expert_TLK=np.asarray(expert_TLK, np.int16),
        sequence_T=np.asarray(sequences, np.int32),
        metadata={"num_experts": num_experts},
    )


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
