"""Capacity policies against a queue that serves one slot at a time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from routing import CAPACITY_POLICIES, Routing, limit_capacity
from routing.losses.capacity import share_capacity_R, tutel_capacity


def queue_reference(routing, capacity_R, rank_TK):
    """Serve slots by falling rank; equal ranks by slot, then token."""
    T, K = routing.expert_TK.shape
    waiting = sorted(((k, t) for k in range(K) for t in range(T)), key=lambda slot: -rank_TK[slot[1]][slot[0]])
    taken, kept = [0] * routing.num_routable, set()
    for k, t in waiting:
        expert = int(routing.expert_TK[t, k])
        if expert < routing.num_routable and taken[expert] < capacity_R[expert]:
            taken[expert] += 1
            kept.add((t, k))
    return kept


@st.composite
def routings(draw):
    num_experts, num_zero = draw(st.integers(1, 5)), draw(st.integers(0, 2))
    T, K = draw(st.integers(1, 12)), draw(st.integers(1, 3))
    seed = draw(st.integers(0, 10_000))
    generator = torch.Generator().manual_seed(seed)
    expert_TK = torch.randint(0, num_experts + num_zero + 1, (T, K), generator=generator)
    weight_TK = torch.randint(0, 4, (T, K), generator=generator) / 4  # ties on purpose
    weight_TK[expert_TK == num_experts + num_zero] = 0
    return Routing(expert_TK=expert_TK, weight_TK=weight_TK, num_experts=num_experts, num_zero_compute=num_zero)


@settings(max_examples=80, deadline=None)
@given(routings(), st.integers(0, 6), st.sampled_from(["first", "priority", "weight"]))
def test_policy_equals_the_queue(routing, capacity, policy):
    rank_TK = CAPACITY_POLICIES[policy](routing).tolist()
    kept = queue_reference(routing, [capacity] * routing.num_routable, rank_TK)
    limited = limit_capacity(routing, capacity, CAPACITY_POLICIES[policy]).validate()
    found = {(t, k) for t, k in (limited.expert_TK < limited.empty_id).nonzero().tolist()}
    assert found == kept
    assert all(limited.expert_TK[t, k] == routing.expert_TK[t, k] for t, k in kept)


def by_the_book(routing, capacity):
    """Algorithm 2 of V-MoE in plain loops: choice by choice, tokens in the order of their largest weight."""
    T, K = routing.expert_TK.shape
    weight = routing.weight_TK.tolist()
    taken, kept = [0] * routing.num_routable, set()
    for k in range(K):
        for t in sorted(range(T), key=lambda t: -max(weight[t])):
            expert = int(routing.expert_TK[t, k])
            if expert < routing.num_routable and taken[expert] < capacity:
                taken[expert] += 1
                kept.add((t, k))
    return kept


@settings(max_examples=80, deadline=None)
@given(routings(), st.integers(0, 6))
def test_priority_is_batch_prioritised_routing(routing, capacity):
    limited = limit_capacity(routing, capacity, CAPACITY_POLICIES["priority"])
    found = {(t, k) for t, k in (limited.expert_TK < limited.empty_id).nonzero().tolist()}
    assert found == by_the_book(routing, capacity)


@pytest.mark.parametrize(
    ("policy", "kept"),
    [
        ("first", [[True, True], [True, False], [True, False]]),
        ("priority", [[True, False], [True, False], [True, True]]),
        ("weight", [[False, True], [True, True], [True, False]]),
    ],
)
def test_policies_worked_out_by_hand(policy, kept):
    """Two places per expert. Largest weights: .5, .6, .9.

    Expert 0 is the first choice of tokens 0 (.5) and 2 (.9) and the second of token 1 (.55): by weight alone token 1
    would take the place of token 0, by V-MoE's order no second choice goes before a first one. Expert 1 is the second
    choice of tokens 0 (.2) and 2 (.1) and the first of token 1 (.6): V-MoE gives the second place to token 2, whose
    largest weight is .9, though this choice of it weighs less than that of token 0.
    """
    routing = Routing(
        expert_TK=torch.tensor([[0, 1], [1, 0], [0, 1]]),
        weight_TK=torch.tensor([[0.5, 0.2], [0.6, 0.55], [0.9, 0.1]]),
        num_experts=2,
    )
    limited = limit_capacity(routing, 2, CAPACITY_POLICIES[policy])
    assert (limited.expert_TK < limited.empty_id).tolist() == kept


@settings(max_examples=40, deadline=None)
@given(routings(), st.data())
def test_each_expert_may_have_its_own_capacity(routing, data):
    capacity_R = [data.draw(st.integers(0, 4)) for _ in range(routing.num_routable)]
    kept = queue_reference(routing, capacity_R, torch.zeros(routing.expert_TK.shape).tolist())
    limited = limit_capacity(routing, torch.tensor(capacity_R), CAPACITY_POLICIES["first"])
    assert {(t, k) for t, k in (limited.expert_TK < limited.empty_id).nonzero().tolist()} == kept


@pytest.mark.parametrize("policy", CAPACITY_POLICIES)
@settings(max_examples=40, deadline=None)
@given(routing=routings(), capacity=st.integers(0, 6))
def test_no_expert_overflows_and_no_slot_is_lost_while_capacity_is_free(policy, routing, capacity):
    limited = limit_capacity(routing, capacity, CAPACITY_POLICIES[policy])
    assert limited.count_R.tolist() == routing.count_R.clamp(max=capacity).tolist()


@pytest.mark.parametrize("policy", CAPACITY_POLICIES)
def test_trap_deepspeed_ranks_by_masked_logits(policy):
    """Its generic top-k path ranks by logits masked to 0: with negative logits the unselected zeros take the slots."""
    logit_TR = -1 - torch.rand(8, 4)
    top = logit_TR.softmax(dim=-1).topk(2, dim=-1)
    routing = Routing(expert_TK=top.indices, weight_TK=top.values, num_experts=4)
    limited = limit_capacity(routing, int(routing.count_R.max()), CAPACITY_POLICIES[policy])
    assert torch.equal(limited.expert_TK, routing.expert_TK), "nothing may be dropped while capacity is free"


def test_random_policy_has_no_prefix_bias():
    routing = Routing(expert_TK=torch.zeros(10, 1, dtype=torch.int64), weight_TK=torch.ones(10, 1), num_experts=1)
    kept_T = sum(
        (limit_capacity(routing, 3, CAPACITY_POLICIES["random"]).weight_TK for _ in range(2000)), torch.zeros(10, 1)
    )
    torch.testing.assert_close(kept_T / 2000, torch.full((10, 1), 0.3), atol=0.06, rtol=0)


def test_share_capacity_is_not_pushed_up_by_rounding():
    assert 1.1 * 50 > 55, "the case: binary rounding lies above the exact 55"
    assert share_capacity_R(1.1, 100, torch.tensor([0.5, 0.5])).tolist() == [55, 55]
    assert share_capacity_R(1.25, torch.tensor(10), torch.full((4,), 0.25)).tolist() == [4, 4, 4, 4]


@pytest.mark.parametrize(
    ("factor", "capacity"),
    [(1.0, 2 * 3), (1.5, 2 * 4), (0.0, 9), (-1.0, 6), (-2.0, 9)],
)
def test_tutel_capacity(factor, capacity):
    """T=10, R=4: ceil is 3; K=2; the largest load is 9."""
    assert tutel_capacity(factor, count_R=torch.tensor([9, 5, 4, 2]), num_tokens=10, top_k=2) == capacity
