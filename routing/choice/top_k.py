"""The best experts of each token. On a CPU, C compares 16 tokens at a time; torch's `topk` takes one token at a time
with scalar code.

Shapes: T tokens, R routable experts, K experts per token.
"""

import torch
from torch import Tensor

from .library import routing_kernels
from .plain_tensors import has_plain_memory

# The C goes through all K places for every score, so its time grows with K R; beyond this K a sort has less to do.
MOST_CHOICES = 64


def top_experts(score_TR: Tensor, top_k: int) -> Tensor:
    """int64 [T, K], best first. On a CPU equal scores go by id, lowest first; elsewhere as `torch.topk` has it.

    Args:
        score_TR: scores without gradient; -inf for experts that may not be chosen. On a CPU NaN counts as -inf.
        top_k: K, at most R.
    """
    if score_TR.device.type != "cpu":
        return score_TR.topk(top_k, dim=-1).indices
    if score_TR.dtype != torch.float32 or top_k > MOST_CHOICES or not has_plain_memory(score_TR):
        return _by_stable_sort(score_TR, top_k)
    return _by_insertion(score_TR, top_k)


def _by_stable_sort(score_TR: Tensor, top_k: int) -> Tensor:
    score_TR = score_TR.masked_fill(score_TR.isnan(), -torch.inf)
    return score_TR.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]


def _by_insertion(score_TR: Tensor, top_k: int) -> Tensor:
    """By `top_k.c`; by a sort on a machine without a C compiler."""
    kernels, (T, R) = routing_kernels(), score_TR.shape
    if kernels is None:
        return _by_stable_sort(score_TR, top_k)
    score_TR = score_TR.contiguous()
    expert_TK = score_TR.new_empty((T, top_k), dtype=torch.int64)
    if kernels.expertier_top_experts(score_TR.data_ptr(), T, R, top_k, expert_TK.data_ptr()):
        raise MemoryError(f"no memory to choose {top_k} of {R} experts")
    return expert_TK
