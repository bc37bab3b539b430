"""Workloads like real ones, generated: skewed loads like DeepSeek-R1's, traces with groups like GPT-OSS's.

Shapes: T tokens, L layers, K experts per token, E experts.
"""

import numpy as np
from numpy.typing import NDArray

from routing.traces import RoutingTrace

Float = NDArray[np.float64]


def generate_loads(
    *,
    layers: int = 58,
    dense_layers: int = 3,
    experts: int = 256,
    tokens: float = 1e8,
    seed: int = 0,
    drift: float = 0.0,
) -> Float:
    """Expert counts [dense_layers + layers, E]; the hottest expert has 5 to 14 times the mean, as in DeepSeek-R1.

    Args:
        layers: MoE layers, behind `dense_layers` all-zero rows.
        dense_layers: at least 0.
        experts: per layer, at least 1.
        tokens: routed tokens per MoE layer, at least 1.
        seed: one model; the same seed keeps its popular experts.
        drift: how far this workload is from the model's usual one: 0 none, 1 another domain altogether.
    """
    # With these two spreads, 58 layers of 256 experts have max/mean loads of 4.3 to 20, median 6.7. Published counts of
    # DeepSeek-R1 have 5.6 to 8.1 on average over layers and 13.7 in the worst layer.
    random = np.random.default_rng([seed, 0])
    log_LE = random.normal(0, 0.75, (layers, experts)) + random.exponential(0.25, (layers, experts))
    other = np.random.default_rng([seed, 1, int(drift * 1e6)])
    log_LE = np.sqrt(1 - drift**2) * log_LE + drift * other.normal(0, 0.8, (layers, experts))
    share_LE = np.exp(log_LE)
    share_LE /= share_LE.sum(axis=1, keepdims=True)
    count_LE = np.round(share_LE * tokens)
    return np.concatenate([np.zeros((dense_layers, experts)), count_LE])


def generate_trace(
    *,
    tokens: int = 20_000,
    layers: int = 24,
    experts: int = 32,
    top_k: int = 4,
    blocks: int = 8,
    affinity: float = 2.0,
    skew: float = 0.7,
    tokens_per_sequence: int = 256,
    seed: int = 0,
) -> RoutingTrace:
    """A trace in which experts of a hidden block fire together, sequences have topics, popularity is skewed.

    Args:
        tokens, layers, experts, top_k: T, L, E, K.
        blocks: hidden groups of experts per layer.
        affinity: how strongly a token's topic draws its block's experts; 0 makes experts independent.
        skew: standard deviation of the experts' log popularity.
        tokens_per_sequence: length of a sequence; topics change slowly within one.
        seed: of topics and popularity; the same seed gives the same trace.

    Returns:
        A trace with combine weights in falling order of slots.
    """
    random = np.random.default_rng(seed)
    sequence_T = np.arange(tokens, dtype=np.int32) // tokens_per_sequence
    home_S = random.integers(blocks, size=int(sequence_T[-1]) + 1)
    # with 40 % strays, 0.20 of the co-activated pairs share a block at the default sizes; independent experts have 0.10
    strays_T = random.random(tokens) < 0.4
    topic_T = np.where(strays_T, random.integers(blocks, size=tokens), home_S[sequence_T])
    expert_TLK = np.empty((tokens, layers, top_k), np.int16)
    weight_TLK = np.empty((tokens, layers, top_k), np.float16)
    for layer in range(layers):
        block_E = random.permutation(np.arange(experts) % blocks)
        popularity_E = random.normal(0, skew, experts)
        score_TE = popularity_E + affinity * (block_E == topic_T[:, None]) + random.gumbel(size=(tokens, experts))
        chosen_TK = np.argsort(-score_TE, axis=1)[:, :top_k]
        expert_TLK[:, layer] = chosen_TK
        raw_TK = np.exp(np.take_along_axis(score_TE, chosen_TK, axis=1) - score_TE.max(axis=1, keepdims=True))
        weight_TLK[:, layer] = raw_TK / raw_TK.sum(axis=1, keepdims=True)
    return RoutingTrace(
        expert_TLK=expert_TLK,
        sequence_T=sequence_T,
        weight_TLK=weight_TLK,
        metadata={"num_experts": experts, "source": f"generated, seed {seed}"},
    )
