"""The best experts of each token. For many tokens on a CPU the scores are sorted in NumPy, whose sort uses the widest
vectors that the processor has; torch's `topk` goes through every row with scalar code.

Shapes: T tokens, R routable experts, K experts per token.
"""

import torch
from torch import Tensor

# below so many scores preparing the keys takes longer than sorting without them
FEWEST_SCORES = 4096


def top_experts(score_TR: Tensor, top_k: int) -> Tensor:
    """int64 [T, K], best first. On a CPU equal scores go by id, lowest first; elsewhere as `torch.topk` has it.

    Args:
        score_TR: scores without gradient; -inf for experts that may not be chosen.
        top_k: K, at most R.
    """
    if score_TR.device.type != "cpu":
        return score_TR.topk(top_k, dim=-1).indices
    if score_TR.dtype != torch.float32 or score_TR.numel() < FEWEST_SCORES or torch.compiler.is_compiling():
        return _by_stable_sort(score_TR, top_k)
    return _by_sorted_keys(score_TR, top_k)


def _by_stable_sort(score_TR: Tensor, top_k: int) -> Tensor:
    return score_TR.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]


def _by_sorted_keys(score_TR: Tensor, top_k: int) -> Tensor:
    """Sorts integers: a score's leading bits above the expert's id. Rows where those bits tie are sorted in full."""
    R = score_TR.shape[1]
    id_bits = (R - 1).bit_length()
    id_mask = (1 << id_bits) - 1
    key_TR = _ordered_bits(score_TR).bitwise_or_(id_mask)
    key_TR -= torch.arange(R, dtype=torch.int32)
    key_TR.numpy().sort(axis=-1)
    best = key_TR[:, max(R - top_k - 1, 0) :].flip(-1)  # and the first that was not chosen
    expert_TK = (~best[:, :top_k]).bitwise_and_(id_mask).long()
    leading = best >> id_bits
    ties_T = (leading[:, 1:] == leading[:, :-1]).any(dim=-1).nonzero()[:, 0]
    if len(ties_T):
        expert_TK[ties_T] = _by_stable_sort(score_TR[ties_T], top_k)
    return expert_TK


def _ordered_bits(score_TR: Tensor) -> Tensor:
    """int32 that compare as the float32 scores do: below zero, more magnitude must count as less."""
    bits_TR = (score_TR + 0.0).view(torch.int32)  # -0.0 becomes 0.0
    return bits_TR.bitwise_xor_((bits_TR >> 31).bitwise_and_(0x7FFFFFFF))
