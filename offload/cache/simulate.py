"""What hit rate would a cache have had on a recorded trace? Deterministic, without torch.

Shapes: T tokens, L MoE layers, K experts per token, E experts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from routing.ground.expect import expect_name
from routing.traces import EMPTY, NEVER, RoutingTrace, next_use_TK

from .catalogue import CACHES, NEEDS_PREDICTOR, make_cache

DEFAULT_POLICIES = ("lru", "lfu", "score", "learned", "belady")


@dataclass(frozen=True, kw_only=True, eq=False)
class Simulated:
    """Hits of one policy on one trace; `hits_L` and `accesses_L` count expert accesses per layer."""

    policy: str
    hits_L: NDArray[np.int64]
    accesses_L: NDArray[np.int64]

    @property
    def hit_rate(self) -> float:
        return float(self.hits_L.sum() / max(self.accesses_L.sum(), 1))

    @property
    def hit_rate_L(self) -> NDArray[np.float64]:
        return self.hits_L / np.maximum(self.accesses_L, 1)


def simulate(
    trace: RoutingTrace,
    cache_experts: int,
    *,
    per_layer: bool = True,
    policies: Sequence[str] = DEFAULT_POLICIES,
) -> dict[str, Simulated]:
    """Replay a trace against caches of `cache_experts` experts.

    All experts of one token at one layer are looked up before any of them is inserted; afterwards all of them are
    resident (as far as they fit).

    Args:
        trace: T tokens in decode order.
        cache_experts: slots per layer if `per_layer`, else slots shared by all layers.
        policies: names in CACHES.

    Returns:
        One result per policy name.

    Raises:
        ValueError: if a policy is unknown or needs a predictor, or a cache has no slot.
    """
    for name in policies:
        expect_name(name, CACHES, "cache policy")
        if name in NEEDS_PREDICTOR:
            raise ValueError(
                f"policy {name} needs a predictor, which a trace is not; `trace predictor --before-pass` says what its "
                "hit rate would be"
            )
    steps = _steps(trace)
    run = _per_layer if per_layer else _shared
    accesses_L = np.array([sum(len(keys) for keys, _, _ in layer) for layer in steps], dtype=np.int64)
    return {
        name: Simulated(
            policy=name,
            hits_L=np.array(run(steps, name, cache_experts, trace.num_experts), dtype=np.int64),
            accesses_L=accesses_L,
        )
        for name in policies
    }


def gap_closed(results: Mapping[str, Simulated]) -> dict[str, float | None]:
    """How much of the way from LRU to Belady each policy goes: 0 is LRU's hit rate, 1 is Belady's.

    Args:
        results: what `simulate` gave, with `lru` and `belady` among the policies.

    Returns:
        One share per policy, negative below LRU; None if there is no gap.
    """
    least, most = results["lru"].hit_rate, results["belady"].hit_rate
    return {
        name: (result.hit_rate - least) / (most - least) if most > least else None for name, result in results.items()
    }


Step = tuple[list[int], list[int], list[float]]


def _steps(trace: RoutingTrace) -> list[list[Step]]:
    """Per layer, per token: distinct experts, their next uses, their weights."""
    steps = []
    for layer in range(trace.num_layers):
        expert_TK = trace.expert_TLK[:, layer]
        upcoming = next_use_TK(expert_TK).tolist()
        weights = None if trace.weight_TLK is None else trace.weight_TLK[:, layer].astype(float).tolist()
        steps.append(
            [
                _distinct(experts, upcoming[token], weights[token] if weights else [1.0] * trace.top_k)
                for token, experts in enumerate(expert_TK.tolist())
            ]
        )
    return steps


def _distinct(experts: list[int], upcoming: list[int], weights: list[float]) -> Step:
    if EMPTY not in experts and len(set(experts)) == len(experts):
        return experts, upcoming, weights
    last = {expert: slot for slot, expert in enumerate(experts) if expert != EMPTY}
    return list(last), [upcoming[slot] for slot in last.values()], [weights[slot] for slot in last.values()]


def _per_layer(steps: list[list[Step]], policy: str, capacity: int, num_experts: int) -> list[int]:
    hits = []
    for layer in steps:
        cache = make_cache(policy, capacity, num_experts)
        hits.append(sum(cache.access(*step) for step in layer))
    return hits


def _shared(steps: list[list[Step]], policy: str, capacity: int, num_experts: int) -> list[int]:
    cache = make_cache(policy, capacity, num_experts * len(steps))
    hits = [0] * len(steps)
    num_layers = len(steps)
    for token in range(len(steps[0])):
        for layer in range(num_layers):
            experts, upcoming, weights = steps[layer][token]
            hits[layer] += cache.access(
                [layer * num_experts + expert for expert in experts],
                [row if row == NEVER else row * num_layers + layer for row in upcoming],
                weights,
            )
    return hits
