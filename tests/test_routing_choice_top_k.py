"""The best experts, by C and by a stable sort, against a sort of Python tuples."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import routing.choice.top_k
from routing.choice.top_k import MOST_CHOICES, _by_insertion, _by_stable_sort, top_experts

SPECIAL = [0.0, -0.0, 1.0, -1.0, 1 + 2**-23, 1 + 2**-22, -1 - 2**-23, 2**-149, -(2**-149), 3e38, torch.inf, -torch.inf]


def by_the_book(score, top_k):
    """Falling scores; equal ones by rising id."""
    return [sorted(range(len(row)), key=lambda e: (-row[e], e))[:top_k] for row in score.tolist()]


@settings(max_examples=150, deadline=None)
@given(st.data(), st.integers(1, 5), st.integers(1, 70))
def test_both_ways_are_the_order_of_scores_then_ids(data, num_tokens, num_experts):
    top_k = data.draw(st.integers(1, num_experts))
    number = st.sampled_from(SPECIAL) | st.floats(width=32, allow_nan=False)
    row = st.lists(number, min_size=num_experts, max_size=num_experts)
    score = torch.tensor([data.draw(row) for _ in range(num_tokens)], dtype=torch.float32)
    expected = by_the_book(score, top_k)
    assert _by_stable_sort(score, top_k).tolist() == expected
    assert _by_insertion(score, top_k).tolist() == expected


@pytest.mark.parametrize(("num_experts", "top_k"), [(64, 8), (60, 4), (16, 2), (8, 8), (256, 8), (1000, 16), (1, 1)])
@pytest.mark.parametrize("spread", [1.0, 1e-6])
def test_many_tokens_are_those_of_topk(num_experts, top_k, spread):
    """A small spread leaves many ties."""
    score = (1 + spread * torch.randn(333, num_experts)).softmax(dim=-1)
    expert_TK = top_experts(score, top_k)
    assert expert_TK.dtype == torch.int64
    assert torch.equal(score.gather(1, expert_TK), score.topk(top_k, dim=-1).values)
    assert torch.equal(expert_TK, _by_stable_sort(score, top_k))


@pytest.mark.parametrize(("num_experts", "top_k"), [(513, 8), (600, 7), (1000, 64)])
def test_a_bound_on_many_scores_loses_none_of_the_best(num_experts, top_k):
    """Ties by the hundred, infinities, rows that are nearly or wholly without a number."""
    score = torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), (40, num_experts))]
    score[0], score[1, :-3], score[2], score[3, 1:] = -torch.inf, torch.nan, torch.nan, -torch.inf
    assert torch.equal(_by_insertion(score, top_k), _by_stable_sort(score, top_k))
    assert _by_insertion(score[4:], top_k).tolist() == by_the_book(score[4:], top_k)


def test_rows_that_are_no_neighbours_in_memory():
    score = torch.randn(64, 300).T
    assert torch.equal(top_experts(score, 5), _by_stable_sort(score, 5))


def test_scores_are_left_as_they_are():
    score = torch.randn(300, 64)
    before = score.clone()
    top_experts(score, 8)
    assert torch.equal(score, before)


def test_few_tokens_many_choices_and_double_precision_choose_by_the_same_rule():
    score = torch.randint(0, 3, (200, 80)).float()
    many = top_experts(score, MOST_CHOICES)
    assert torch.equal(top_experts(score[:1], MOST_CHOICES), many[:1])
    assert torch.equal(top_experts(score.double(), MOST_CHOICES), many)
    assert torch.equal(top_experts(score, MOST_CHOICES + 1)[:, :-1], many)


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_nothing(threads, several_threads):
    score = torch.randint(0, 5, (2000, 64)).float()
    expected = _by_stable_sort(score, 8)
    several_threads(threads)
    for _ in range(20):
        assert torch.equal(top_experts(score, 8), expected)


def test_a_machine_without_a_compiler_chooses_the_same(monkeypatch):
    score = torch.randint(0, 3, (200, 64)).float()
    expected = top_experts(score, 8)
    monkeypatch.setattr(routing.choice.top_k, "routing_kernels", lambda: None)
    assert torch.equal(top_experts(score, 8), expected)


def test_a_diverged_token_disturbs_no_other():
    score = torch.randn(300, 64)
    expected = top_experts(score, 8)
    score[7], score[9, 3] = torch.nan, -torch.nan
    found = top_experts(score, 8)
    others = [t for t in range(300) if t not in (7, 9)]
    assert torch.equal(found[others], expected[others])
    assert all(len(set(row)) == 8 and min(row) >= 0 and max(row) < 64 for row in found[[7, 9]].tolist())
