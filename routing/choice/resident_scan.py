"""The resident sets of a layer along sequences: at most one expert is swapped per token.

Shapes: B sequences, S positions, E experts.
"""

import torch
from torch import Tensor

from .library import routing_kernels
from .plain_tensors import has_plain_memory
from .top_k import top_experts


def resident_scan(
    score_BSE: Tensor,
    is_valid_BS: Tensor,
    before_BE: Tensor | None,
    num_residents: int,
    *,
    rank: int,
    margin: float = 0.0,
) -> Tensor:
    """The resident set after each token, uint8 `[B, S, E]`, 1 for residents.

    A sequence's first token chooses the whole set. From then on the best expert outside replaces the worst one inside,
    if fewer than `rank` residents are a match for it. Padding changes nothing. Equal scores go to the lower id.

    Args:
        score_BSE: scores without gradient, in the order of positions.
        is_valid_BS: False for padding.
        before_BE: uint8 sets that earlier calls ended with, all 0 where a sequence has not begun; None where none has.
        num_residents: experts of a set, 1..E.
        rank: 1..num_residents; with K the newcomer would be among the token's K best, with `num_residents` it is better
            than the worst resident.
        margin: a resident is a match for a newcomer that is better by at most this much; at least 0.

    Source: github.com/ncylich/temporal-moe (2026): one swap per token, top-k within the residents.
    """
    if before_BE is None:
        before_BE = torch.zeros_like(score_BSE[:, 0], dtype=torch.uint8)
    is_plain = score_BSE.dtype == torch.float32 and has_plain_memory(score_BSE, is_valid_BS, before_BE)
    if is_plain and (kernels := routing_kernels()) is not None:
        given = score_BSE.contiguous(), is_valid_BS.contiguous(), before_BE.contiguous()
        after_BSE = torch.empty(score_BSE.shape, dtype=torch.uint8)
        addresses = [tensor.data_ptr() for tensor in (*given, after_BSE)]
        kernels.expertier_resident_scan(*addresses, *score_BSE.shape, num_residents, rank, margin)
        return after_BSE
    return resident_scan_reference(score_BSE, is_valid_BS, before_BE, num_residents, rank=rank, margin=margin)


def resident_scan_reference(
    score_BSE: Tensor, is_valid_BS: Tensor, before_BE: Tensor, num_residents: int, *, rank: int, margin: float
) -> Tensor:
    """The same, position by position in torch."""
    sets, is_in_BE = [], before_BE.bool()
    for score_BE, is_valid_B in zip(score_BSE.unbind(1), is_valid_BS.unbind(1), strict=True):
        first_BC = top_experts(score_BE, num_residents)
        chosen_BE = torch.zeros_like(is_in_BE).scatter(1, first_BC, True)
        after_BE = torch.where(is_in_BE.any(dim=1, keepdim=True), _swapped(score_BE, is_in_BE, rank, margin), chosen_BE)
        is_in_BE = torch.where(is_valid_B[:, None], after_BE, is_in_BE)
        sets.append(is_in_BE)
    return torch.stack(sets, dim=1).to(torch.uint8)


def _swapped(score_BE: Tensor, is_in_BE: Tensor, rank: int, margin: float) -> Tensor:
    best_B1 = score_BE.masked_fill(is_in_BE, -torch.inf).argmax(dim=1, keepdim=True)
    inside_BE = score_BE.masked_fill(~is_in_BE, torch.inf)
    worst_B1 = score_BE.shape[1] - 1 - inside_BE.flip(1).argmin(dim=1, keepdim=True)
    is_match_BE = is_in_BE & ~(score_BE.gather(1, best_B1) > score_BE + margin)
    enters_B1 = (is_match_BE.sum(dim=1, keepdim=True) < rank) & ~is_in_BE.all(dim=1, keepdim=True)
    swapped_BE = is_in_BE.scatter(1, worst_B1, False).scatter(1, best_B1, True)
    return torch.where(enters_B1, swapped_BE, is_in_BE)
