"""Capacity policies: which slots an expert keeps when more tokens chose it than it may take.

Shapes: T tokens, K slots per token, N = T * K rows in slot-major order (all first choices before all second ones).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .assignment import Routing

CapacityPolicy = Callable[[Routing], Tensor]


def first(routing: Routing) -> Tensor:
    """First come, first served; second choices queue last. Source: GShard, arXiv:2006.16668, algorithm 1."""
    return torch.zeros_like(routing.weight_TK)


def priority(routing: Routing) -> Tensor:
    """The largest weights stay. Source: V-MoE batch-prioritised routing, arXiv:2106.05974, section 4."""
    return routing.weight_TK.detach()


def random(routing: Routing) -> Tensor:
    """A random subset stays. Source: DeepSpeed random token selection, arXiv:2109.10465, section 3.2."""
    return torch.rand_like(routing.weight_TK)


CAPACITY_POLICIES: dict[str, CapacityPolicy] = {"first": first, "priority": priority, "random": random}


def limit_capacity(routing: Routing, capacity: int, policy: CapacityPolicy) -> Routing:
    """Empty the slots that overflow `capacity` tokens per routable expert.

    Args:
        routing: the routing as chosen.
        capacity: tokens that one expert may take.
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
    return routing.drop((queue_place_N >= capacity).view(routing.expert_TK.T.shape).T)
