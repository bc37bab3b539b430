"""What a routing trace says about which experts belong together, within a layer and across layers.

Shapes: T tokens, L MoE layers, K experts per token, E experts.
"""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .routing_trace import RoutingTrace

if TYPE_CHECKING:
    from scipy import sparse

Integer = NDArray[np.int64]


def coactivation_EE(trace: RoutingTrace, layer: int) -> Integer:
    """Tokens that use both experts of a pair at `layer`; the diagonal is the load."""
    used = used_TE(trace, layer)
    return np.asarray((used.T @ used).todense(), dtype=np.int64)


def transition_EE(trace: RoutingTrace, layer: int) -> Integer:
    """Tokens that use expert i at `layer` and expert j at `layer + 1`, as entry [i, j].

    Source: Yao et al. 2024 (ExFlow), arXiv:2401.08383, section 3.
    """
    if not 0 <= layer < trace.num_layers - 1:
        raise ValueError(f"transitions leave layers 0..{trace.num_layers - 2}; got layer {layer}")
    return np.asarray((used_TE(trace, layer).T @ used_TE(trace, layer + 1)).todense(), dtype=np.int64)


def used_TE(trace: RoutingTrace, layer: int) -> "sparse.csr_array":
    """0/1 matrix: which experts a token uses at `layer` (an expert named twice by a token counts once)."""
    from scipy import sparse

    expert_TK = trace.expert_TLK[:, layer]
    token_id, slot = np.nonzero(expert_TK >= 0)
    shape = (trace.num_tokens, trace.num_experts)
    used = sparse.csr_array((np.ones(len(token_id), np.int64), (token_id, expert_TK[token_id, slot])), shape=shape)
    used.data[:] = 1
    return used
