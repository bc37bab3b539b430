"""Hops: how often a token's next experts are on another GPU than its current ones.

Only engines that leave a token where its experts are (context-coherent, ExFlow) save anything by it; SGLang, vLLM,
TensorRT-LLM and Megatron return every token to its home rank after each layer, and should use fan-out.
Source: Yao et al. 2024 (ExFlow), arXiv:2401.08383. Shapes: T tokens, L layers, K experts per token, G GPUs.
"""

import numpy as np
from numpy.typing import NDArray

from routing.traces import RoutingTrace

from ..contract.cluster import Cluster
from ..contract.plan import Plan
from .dispatch import share_EG

Float = NDArray[np.float64]


def hops_L(plan: Plan, trace: RoutingTrace) -> Float:
    """Mean cost of the first-choice expert's move from layer l-1 to l, as `hop_cost_GG` has it; 0 for the first layer.

    The first choice is the expert of the largest combine weight, or of slot 0 where no weights were recorded.
    """
    return _moves_L(plan, trace, hop_cost_GG(plan.cluster) if plan.cluster.rank_cost_GG is not None else None)


def hop_share(plan: Plan, trace: RoutingTrace) -> float:
    """Share of tokens whose first-choice expert moves to another GPU, mean over the L - 1 transitions."""
    return float(_moves_L(plan, trace, None)[1:].mean()) if plan.num_layers > 1 else 0.0


def hop_cost_GG(cluster: Cluster) -> Float:
    """Cost of a hop: 1 between different GPUs, or `links.rank_cost_matrix` over its off-diagonal mean."""
    G = cluster.num_gpus
    if cluster.rank_cost_GG is None:
        return 1 - np.eye(G)
    mean = cluster.rank_cost_GG.sum() / max(G * (G - 1), 1)
    return cluster.rank_cost_GG / mean if mean > 0 else np.zeros((G, G))


def _moves_L(plan: Plan, trace: RoutingTrace, cost_GG: Float | None) -> Float:
    """Mean cost of the moves into each layer; without a matrix every change of GPU costs 1."""
    choice_TL = first_choice_TL(trace)
    moves = np.zeros(plan.num_layers)
    before_EG = np.zeros((0, 0))
    for layer in range(plan.num_layers):
        load_E = _counts(choice_TL[:, layer], plan.num_experts)
        here_EG = share_EG(plan.copies_LEG[layer], plan.cluster, plan.dispatch, load_E)
        if layer > 0:
            met_EE = (before_EG if cost_GG is None else before_EG @ cost_GG) @ here_EG.T
            pairs, count = count_pairs(choice_TL[:, layer - 1], choice_TL[:, layer])
            met = float(met_EE[pairs[:, 0], pairs[:, 1]] @ count) / max(float(count.sum()), 1.0)
            moves[layer] = 1 - met if cost_GG is None and len(count) else met
        before_EG = here_EG
    return moves


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
