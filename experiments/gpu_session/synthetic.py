"""A made-up routing trace for machines that have none: popular experts are chosen often, and the last token's again.

Shapes: T tokens, L MoE layers, K experts per token, E experts.
"""

import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from routing.traces import RoutingTrace

TOKENS, LAYERS, EXPERTS, TOP_K = 1024, 16, 32, 4
"""A replay of 8.6 GB, of which 4 GiB of GPU memory hold a third and 8 GiB nearly all."""
AGAIN = 0.5
"""Chance that an expert of the last token is chosen again, about that of the traces in the records."""


def synthetic_trace(num_tokens: int, num_layers: int, num_experts: int, top_k: int, *, seed: int) -> RoutingTrace:
    """One sequence whose experts repeat as those of real models do.

    Args:
        num_tokens: T, at least 1.
        num_layers: L, at least 1; each has popular experts of its own.
        num_experts: E, at least 2 K.
        top_k: K, at least 1.
        seed: equal seeds give equal traces.
    """
    generator = np.random.default_rng(seed)
    expert_TLK = np.empty((num_tokens, num_layers, top_k), np.int16)
    for layer in range(num_layers):
        popularity_E = generator.permutation(1 / np.arange(1, num_experts + 1))
        for token in range(num_tokens):
            again_K = expert_TLK[token - 1, layer] if token else expert_TLK[0, layer][:0]
            expert_TLK[token, layer] = _choose(again_K, popularity_E, top_k, generator)
    metadata = {"num_experts": num_experts, "source": "synthetic", "model": f"popular experts, seed {seed}"}
    return RoutingTrace(expert_TLK=expert_TLK, sequence_T=np.zeros(num_tokens, np.int32), metadata=metadata)


def _choose(
    again_K: NDArray[np.int16], popularity_E: NDArray[np.float64], top_k: int, generator: np.random.Generator
) -> NDArray[np.int16]:
    """Some of the last token's experts, the others by popularity (by exponential clocks: without replacement)."""
    kept = again_K[generator.random(len(again_K)) < AGAIN]
    clock_E = generator.exponential(size=len(popularity_E)) / popularity_E
    clock_E[kept] = -1.0
    return np.argsort(clock_E)[:top_k].astype(np.int16)


if __name__ == "__main__":
    synthetic_trace(TOKENS, LAYERS, EXPERTS, TOP_K, seed=0).save(Path(sys.argv[1]))
