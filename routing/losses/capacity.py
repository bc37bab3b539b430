"""Capacity: how many tokens an expert may take, and which of them it keeps when more chose it.

Shapes: T tokens, K slots per token, N = T * K rows in slot-major order (all first choices before all second ones),
R = E + Z routable experts.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..contract.assignment import Routing

CapacityPolicy = Callable[[Routing], Tensor]
# Taken off before rounding up: 1.1 * 10 is above 11 in binary. No capacity that is meant to be a fraction is that close
# above a whole number.
ROUNDING = 1e-6


def first(routing: Routing) -> Tensor:
    """First come, first served; second choices queue last. Source: GShard, arXiv:2006.16668, algorithm 1."""
    return torch.zeros_like(routing.weight_TK)


def priority(routing: Routing) -> Tensor:
    """First choices before second ones; within a choice, tokens by their largest weight, whatever this choice weighs.

    Source: V-MoE batch-prioritised routing, Riquelme et al. 2021, arXiv:2106.05974, algorithm 2.
    """
    T, K = routing.weight_TK.shape
    order_T = torch.argsort(routing.weight_TK.detach().amax(dim=-1), descending=True, stable=True)
    place_T = torch.empty_like(order_T)
    place_T[order_T] = torch.arange(T, device=order_T.device)
    return -(torch.arange(K, device=order_T.device) * T + place_T[:, None])


def weight(routing: Routing) -> Tensor:
    """Whatever choice it is, the largest weights stay. Source: `probs`, a drop policy of Megatron-Core's router."""
    return routing.weight_TK.detach()


def random(routing: Routing) -> Tensor:
    """A random subset stays. Source: DeepSpeed random token selection, arXiv:2109.10465, section 3.2."""
    return torch.rand_like(routing.weight_TK)


CAPACITY_POLICIES: dict[str, CapacityPolicy] = {
    "first": first,
    "priority": priority,
    "weight": weight,
    "random": random,
}


def share_capacity_R(factor: float, num_slots: Tensor | int, share_R: Tensor) -> Tensor:
    """int64 `ceil(factor * num_slots * share)` per routable expert.

    Args:
        factor: slack over the balanced load.
        num_slots: slots that tokens filled, T * K without padding.
        share_R: the share of them that each expert should take; sums to 1.
    """
    exact_R = share_R.double() * num_slots * factor
    return torch.ceil(exact_R - ROUNDING).long()


def tutel_capacity(factor: float, *, count_R: Tensor, num_tokens: int, top_k: int) -> int:
    """Tokens per expert by Tutel's dynamic rule.

    Args:
        factor: above 0: `K * int(factor * ceil(T / R))`; 0: the largest load, which drops nothing; below 0: the largest
            load, but at most what `-factor` would give.
        count_R: how many tokens chose each expert.
        num_tokens: T, padding left out.
        top_k: K of this call (Tutel's "top-any": it may change from call to call).

    Source: Hwang et al. 2023 (Tutel), arXiv:2206.03382, section 3.4, and its `extract_critical`.
    """
    largest = int(count_R.max())
    if factor == 0:
        return largest
    fixed = top_k * int(abs(factor) * math.ceil(num_tokens / len(count_R)))
    return fixed if factor > 0 else min(largest, fixed)


def limit_capacity(routing: Routing, capacity: int | Tensor, policy: CapacityPolicy) -> Routing:
    """Empty the slots that overflow an expert's capacity.

    Args:
        routing: the routing as chosen.
        capacity: tokens that one expert may take, or int64 [R] for each of them.
        policy: gives each slot a rank [T, K]; larger stays first, ties go to the earlier row.

    Returns:
        The routing without the overflow. Weights are not renormalised.
    """
    expert_N = routing.expert_TK.T.flatten()
    rank_N = policy(routing).T.flatten()
    order_N = torch.argsort(rank_N, descending=True, stable=True)
    order_N = order_N[torch.argsort(expert_N[order_N], stable=True)]
    count = torch.bincount(expert_N, minlength=routing.num_routable + 1)
    start = count.cumsum(0) - count
    queue_place_N = torch.empty_like(expert_N)
    queue_place_N[order_N] = torch.arange(len(expert_N), device=expert_N.device) - start[expert_N[order_N]]
    if isinstance(capacity, Tensor):
        capacity = torch.cat([capacity, capacity.new_zeros(1)])[expert_N]
    return routing.drop((queue_place_N >= capacity).view(routing.expert_TK.T.shape).T)
