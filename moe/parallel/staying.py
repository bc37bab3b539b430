"""Tokens that stay where their experts are: a layer's sum arrives where the token goes on, not where it came from.

A token at a process without any of its experts is sent to some, and one partial sum less travels if it goes on at one
of them. What follows there (attention, the next router) needs the keys and values of its sequence there; who calls
this decides whether that pays.

Source: Yao et al. 2024 (ExFlow), arXiv:2401.08383, section IV-B, "context coherence".

Shapes: N rows of tokens that are here, K slots, D model width, G processes, M rows that this process receives,
R rows of one exchange.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, distributed

from .dispatch import ID_BYTES, Compute, exchanged, ways


@dataclass(frozen=True, kw_only=True, eq=False)
class Here:
    """The tokens that are on a process, in the order of their numbers.

    Args:
        number_N: int64 the numbers of the tokens, which no two processes share.
        x_ND: their hidden states.
    """

    number_N: Tensor
    x_ND: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Crossing:
    """Rows of one layer from this process to each: hidden states to experts, then partial sums to where tokens go on.

    Args:
        there_G, on_G: int64 rows, those that stay on this process included.
        there_bytes, on_bytes: of one row of each kind.
    """

    there_G: Tensor
    on_G: Tensor
    there_bytes: int
    on_bytes: int


def go_on(
    here: Here,
    rank_NK: Tensor,
    local_NK: Tensor,
    weight_NK: Tensor,
    next_N: Tensor,
    compute: Compute,
    follow: Callable[[Tensor, Tensor], Tensor],
    group: distributed.ProcessGroup,
    *,
    empty_id: int,
) -> tuple[Here, Crossing]:
    """One layer of experts, after which each token is where it goes on; all processes call it together.

    Args:
        here: tokens of this process.
        rank_NK, local_NK: process and local id of each slot; G for none.
        weight_NK: combine weights.
        next_N: int64 the process of each token afterwards.
        compute: an experts forward of this process: (rows, local ids, weights) -> weighted sums.
        follow: (hidden states, sums) -> hidden states of the next layer, row by row.
        group: the G processes.
        empty_id: an id that contributes nothing on any process.

    Returns:
        The tokens that are here now, and what was sent. A token's partial sums are added by rising process.
    """
    K, G, rank = rank_NK.shape[1], group.size(), group.rank()
    # a process without experts of a token that goes on there gets its hidden state all the same
    moves_N1 = torch.where(next_N == rank, G, next_N)[:, None]
    way = ways(torch.cat([rank_NK, moves_N1], dim=1), group)
    is_there = rank_NK[way.token_N] == way.target_N[:, None]
    id_RK = torch.where(is_there, local_NK[way.token_N], empty_id)
    tag_R2 = torch.stack([next_N[way.token_N], here.number_N[way.token_N]], dim=1)
    sent = (way.sent, way.received, group)
    id_MK, tag_M2 = exchanged(torch.cat([id_RK, tag_R2], dim=1).int(), *sent).long().split([K, 2], dim=1)
    x_MD = exchanged(here.x_ND[way.token_N], *sent)
    weight_MK = exchanged(torch.where(is_there, weight_NK[way.token_N], 0.0), *sent)
    next_M, number_M = tag_M2.unbind(dim=1)
    is_asked_M = (id_MK != empty_id).any(dim=1)
    y_MD = torch.zeros_like(x_MD)
    if is_asked_M.any():
        y_MD[is_asked_M] = compute(x_MD[is_asked_M], id_MK[is_asked_M], weight_MK[is_asked_M])
    order_M = is_asked_M.nonzero().flatten()
    order_M = order_M[next_M[order_M].argsort(stable=True)]
    on_G = torch.bincount(next_M[order_M], minlength=G)
    back_G = torch.empty_like(on_G)
    distributed.all_to_all_single(back_G, on_G, group=group)
    sums = (on_G.tolist(), back_G.tolist(), group)
    y_RD, of_R = exchanged(y_MD[order_M], *sums), exchanged(number_M[order_M].int(), *sums).long()
    # hidden states that are needed here: of tokens that stayed, and of those that arrived to stay
    stays_N, comes_M = next_N == rank, (next_M == rank) & ~torch.isin(number_M, here.number_N)
    number_N, place_N = torch.cat([here.number_N[stays_N], number_M[comes_M]]).sort()
    x_ND = torch.cat([here.x_ND[stays_N], x_MD[comes_M]])[place_N]
    sum_ND = _added(y_RD, torch.searchsorted(number_N, of_R), len(number_N), min(K, G))
    item = x_ND.element_size()
    crossing = Crossing(
        there_G=torch.tensor(way.sent),
        on_G=on_G,
        there_bytes=x_ND.shape[1] * item + K * (ID_BYTES + weight_NK.element_size()) + 2 * ID_BYTES,
        on_bytes=x_ND.shape[1] * item + ID_BYTES,
    )
    return Here(number_N=number_N, x_ND=follow(x_ND, sum_ND)), crossing


def _added(y_RD: Tensor, token_R: Tensor, tokens: int, most: int) -> Tensor:
    """The sums of rows by token, in the order of the rows, as `dispatch` adds them."""
    order_R = token_R.argsort(stable=True)
    sorted_R = token_R[order_R]
    first_N = torch.searchsorted(sorted_R, torch.arange(tokens))
    place_NJ = torch.full((tokens, most), len(y_RD))
    place_NJ[sorted_R, torch.arange(len(sorted_R)) - first_N[sorted_R]] = order_R
    return torch.cat([y_RD, y_RD.new_zeros(1, y_RD.shape[1])])[place_NJ].sum(dim=1)
