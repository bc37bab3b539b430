"""Cache policies: hand-computed cases, a list-based oracle, brute force for Belady, and what every policy promises."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.cache.catalogue import CACHES, make_cache
from offload.cache.policies import LRU, NEVER, Belady
from routing.traces import next_use_TK

TOKENS = st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=3, unique=True), min_size=1, max_size=40)
SINGLES = st.lists(st.integers(0, 6).map(lambda key: [key]), min_size=1, max_size=60)


def _next_uses(tokens):
    """Next uses of a ragged list of tokens, as the simulator gives them."""
    width = max(len(token) for token in tokens)
    padded = np.array([token + [-1 - slot for slot in range(width - len(token))] for token in tokens])
    return [row[: len(token)] for row, token in zip(next_use_TK(padded).tolist(), tokens, strict=True)]


def _hits(name, tokens, capacity):
    cache = make_cache(name, capacity, 7)
    return sum(cache.access(token, upcoming) for token, upcoming in zip(tokens, _next_uses(tokens), strict=True))


def test_lru_by_hand():
    cache = LRU(2)
    assert [cache.access([key]) for key in (1, 2, 1, 3, 2, 1)] == [0, 0, 1, 0, 0, 0]
    assert set(cache.resident) == {1, 2}


def test_belady_by_hand():
    tokens = [[1], [2], [3], [1], [2], [3]]
    assert _hits("belady", tokens, 2) == 2
    assert _hits("lru", tokens, 2) == 0


def test_all_keys_of_a_token_are_looked_up_before_any_is_inserted():
    cache = LRU(2)
    cache.access([1, 2])
    assert cache.access([3, 1]) == 1
    assert set(cache.resident) == {1, 3}


@given(tokens=TOKENS, capacity=st.integers(1, 8))
def test_lru_equals_a_list(tokens, capacity):
    recency, hits = [], 0
    for token in tokens:
        hits += sum(key in recency[:capacity] for key in token)
        for key in token:
            recency = [key] + [other for other in recency if other != key]
    assert _hits("lru", tokens, capacity) == hits


@settings(max_examples=60)
@given(keys=st.lists(st.integers(0, 3), min_size=1, max_size=9), capacity=st.integers(1, 3))
def test_belady_equals_the_best_of_all_choices(keys, capacity):
    def best(position, resident):
        if position == len(keys):
            return 0
        key = keys[position]
        if key in resident:
            return 1 + best(position + 1, resident)
        if len(resident) < capacity:
            return best(position + 1, resident | {key})
        return max(best(position + 1, resident - {victim} | {key}) for victim in resident)

    assert _hits("belady", [[key] for key in keys], capacity) == best(0, frozenset())


@pytest.mark.parametrize("name", sorted(CACHES))
@given(tokens=TOKENS, capacity=st.integers(1, 8))
def test_every_policy_stays_within_capacity_and_keeps_the_token(name, tokens, capacity):
    cache = make_cache(name, capacity, 7)
    for token, upcoming in zip(tokens, _next_uses(tokens), strict=True):
        cache.access(token, upcoming)
        assert len(cache) <= capacity
        if len(token) <= capacity:
            assert all(key in cache for key in token)


@pytest.mark.parametrize("name", sorted(set(CACHES) - {"belady"}))
@given(tokens=SINGLES, capacity=st.integers(1, 8))
def test_no_policy_beats_belady(name, tokens, capacity):
    assert _hits(name, tokens, capacity) <= _hits("belady", tokens, capacity)


def test_pinned_keys_go_last():
    cache = LRU(3)
    cache.access([1, 2, 3])
    assert cache.evict(pinned=[1, 2]) == 3
    assert cache.evict(pinned=[1, 2]) == 1


def test_heap_stays_small():
    cache = Belady(2)
    for _ in range(5000):
        cache.access([1, 2])
    assert len(cache._heap) < 200


def test_bad_arguments():
    with pytest.raises(ValueError, match="capacity 0"):
        make_cache("lru", 0, 4)
    with pytest.raises(ValueError, match=r"there are .*lru"):
        make_cache("fifo", 2, 4)


def test_next_use_by_hand():
    expert_TK = np.array([[0, 1], [2, 0], [1, 2]])
    assert next_use_TK(expert_TK).tolist() == [[1, 2], [2, NEVER], [NEVER, NEVER]]


def test_learning_which_experts_come_together_beats_their_frequency():
    """Experts come in two shifting groups: the model learns that one member announces the others."""
    rng = np.random.default_rng(0)
    tokens = []
    for _ in range(400):
        group = rng.integers(3)
        tokens += [[int(4 * group + rng.integers(4))] for _ in range(6)]
    hits = {}
    for name in ("score", "learned", "lru"):
        cache = make_cache(name, 4, 12)
        hits[name] = sum(cache.access(token) for token in tokens[:])
    assert hits["learned"] > 1.03 * hits["score"]


def test_the_learned_model_starts_as_a_decayed_frequency():
    cache = make_cache("learned", 2, 4)
    for key in (0, 0, 0, 1, 2):
        cache.access([key])
    assert set(cache.resident) == {0, 2}


def test_rank_orders_evictions():
    for name in sorted(set(CACHES) - {"belady"}):
        cache = make_cache(name, 3, 4)
        for key in (0, 1, 0, 2, 0, 1):
            cache.access([key])
        ranked = sorted(cache.resident, key=cache.rank)
        assert [cache.evict() for _ in range(3)] == ranked


def test_learning_keeps_to_one_thread_of_openblas_and_leaves_the_others_as_they_were(monkeypatch):
    pools = pytest.importorskip("threadpoolctl").ThreadpoolController().select(internal_api="openblas")
    before, during = [pool["num_threads"] for pool in pools.info()], []

    def solve(left, right, solve=np.linalg.solve):
        during.extend(pool["num_threads"] for pool in pools.info())
        return solve(left, right)

    monkeypatch.setattr(np.linalg, "solve", solve)
    cache = make_cache("learned", 2, 8)
    for key in range(170):
        cache.access([key % 8])
    assert during == [1] * len(before)
    assert [pool["num_threads"] for pool in pools.info()] == before
