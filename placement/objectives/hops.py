"""Hops: how often a token's next experts are on another GPU than its current ones.

Only engines that leave a token where its experts are (context-coherent, ExFlow) save anything by it; SGLang, vLLM,
TensorRT-LLM and Megatron return every token to its home rank after each layer, and should use fan-out.
Source: Yao et al. 2024 (ExFlow), arXiv:2401.08383. Shapes: T tokens, L layers, K experts per token, G GPUs.
"""

import numpy as np
from numpy.typing import NDArray

from routing.traces import RoutingTrace

from ..dispatch import share_EG
from ..plan import Plan

Float = NDArray[np.float64]


def hops_L(plan: Plan, trace: RoutingTrace) -> Float:
    """Share of tokens whose first-choice expert moves to another GPU between layer l-1 and l; 0 for the first layer.

    The first choice is the expert of the largest combine weight, or of slot 0 where no weights were recorded.
    """
    choice_TL = first_choice_TL(trace)
    share_LEG = [
        share_EG(plan.copies_LEG[layer], plan.cluster, plan.dispatch, _counts(choice_TL[:, layer], plan.num_experts))
        for layer in range(plan.num_layers)
    ]
    hops = np.zeros(plan.num_layers)
    for layer in range(1, plan.num_layers):
        pairs, count = count_pairs(choice_TL[:, layer - 1], choice_TL[:, layer])
        stay = (share_LEG[layer - 1][pairs[:, 0]] * share_LEG[layer][pairs[:, 1]]).sum(axis=1)
        hops[layer] = 1 - (stay * count).sum() / count.sum() if len(count) else 0.0
    return hops


def hop_share(plan: Plan, trace: RoutingTrace) -> float:
    """Mean of `hops_L` over the L - 1 transitions."""
    return float(hops_L(plan, trace)[1:].mean()) if plan.num_layers > 1 else 0.0


def first_choice_TL(trace: RoutingTrace, layers: slice = slice(None)) -> NDArray[np.int64]:
    """The expert of the largest weight (slot 0 without weights) of each token at some layers."""
    expert_TLK = trace.expert_TLK[:, layers]
    if trace.weight_TLK is None:
        return expert_TLK[:, :, 0].astype(np.int64)
    best_TL1 = np.asarray(trace.weight_TLK[:, layers], np.float32).argmax(axis=2)[:, :, None]
    return np.take_along_axis(expert_TLK, best_TL1, axis=2)[:, :, 0].astype(np.int64)


def count_pairs(here_T: NDArray[np.int64], there_T: NDArray[np.int64]) -> tuple[NDArray[np.int64], Float]:
    """Distinct (here, there) pairs and how many tokens make each; empty slots (-1) drop out."""
    keep = (here_T >= 0) & (there_T >= 0)
    pairs = np.stack([here_T[keep], there_T[keep]], axis=1)
    if not len(pairs):
        return pairs, np.zeros(0)
    distinct, count = np.unique(pairs, axis=0, return_counts=True)
    return distinct, count.astype(np.float64)


def _counts(choice_T: NDArray[np.int64], experts: int) -> Float:
    return np.bincount(choice_T[choice_T >= 0], minlength=experts).astype(np.float64)
