"""Form batches of prompts that share experts, so that a batch touches fewer of them. Without torch.

Shapes: N prompts, L MoE layers, E experts.
Source: He et al. 2024, "ExpertFlow", arXiv:2410.17954, section on token scheduling (there K-means on Hamming distance
for two batches; here any number of equal batches, by greedy seeding and swaps).
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from routing.traces import RoutingTrace

Signature = NDArray[np.bool_]


def signatures(trace: RoutingTrace) -> Signature:
    """Which experts each sequence of a trace uses in any layer, `[N, L * E]`."""
    sequences = np.unique(trace.sequence_T)
    result = np.zeros((len(sequences), trace.num_layers * trace.num_experts), bool)
    for row, sequence in enumerate(sequences):
        expert_TLK = trace.expert_TLK[trace.sequence_T == sequence]
        for layer in range(trace.num_layers):
            ids = expert_TLK[:, layer]
            result[row, layer * trace.num_experts + np.unique(ids[ids >= 0])] = True
    return result


def experts_touched(signature: Signature, batches: Sequence[Sequence[int]]) -> list[int]:
    """Distinct experts of all layers that each batch needs."""
    return [int(signature[list(batch)].any(axis=0).sum()) for batch in batches]


def in_order(num_prompts: int, batch_size: int) -> list[list[int]]:
    """Batches in the order in which the prompts came."""
    return [list(range(start, min(start + batch_size, num_prompts))) for start in range(0, num_prompts, batch_size)]


def form_batches(signature: Signature, batch_size: int, *, rounds: int = 4) -> list[list[int]]:
    """Batches of `batch_size` prompts (the last may be smaller) that together touch few experts.

    Greedy: each batch starts with the prompt that needs most, then takes the one that adds the fewest experts;
    afterwards pairs of prompts swap batches while that helps. Never worse than the order in which the prompts came.

    Args:
        signature: which experts each prompt is expected to use, `[N, L * E]`.
        rounds: passes over all pairs of batches.

    Raises:
        ValueError: if batch_size < 1.
    """
    if batch_size < 1:
        raise ValueError(f"a batch has at least 1 prompt; got {batch_size}")
    batches = _greedy(signature, batch_size)
    for _ in range(rounds):
        if not _swap_pass(signature, batches):
            break
    plain = in_order(len(signature), batch_size)
    if sum(experts_touched(signature, plain)) <= sum(experts_touched(signature, batches)):
        return plain
    return batches


def _greedy(signature: Signature, batch_size: int) -> list[list[int]]:
    left = set(range(len(signature)))
    batches = []
    while left:
        first = max(left, key=lambda prompt: (signature[prompt].sum(), -prompt))
        batch, union = [first], signature[first].copy()
        left.remove(first)
        while left and len(batch) < batch_size:
            best = min(left, key=lambda prompt: (int((signature[prompt] & ~union).sum()), prompt))
            batch.append(best)
            union |= signature[best]
            left.remove(best)
        batches.append(sorted(batch))
    return batches


def _swap_pass(signature: Signature, batches: list[list[int]]) -> bool:
    """Swap pairs between batches where that lowers the sum; tells whether anything changed."""
    improved = False
    for one in range(len(batches)):
        for other in range(one + 1, len(batches)):
            for i in range(len(batches[one])):
                for j in range(len(batches[other])):
                    improved |= _try_swap(signature, batches[one], batches[other], i, j)
    return improved


def _try_swap(signature: Signature, one: list[int], other: list[int], i: int, j: int) -> bool:
    before = sum(experts_touched(signature, [one, other]))
    one[i], other[j] = other[j], one[i]
    if sum(experts_touched(signature, [one, other])) < before:
        return True
    one[i], other[j] = other[j], one[i]
    return False
