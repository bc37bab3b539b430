"""The best places of a square grid of experts, from scores of its rows and of its columns.

On a CPU, C takes a query's scores once: it finds the best rows, columns and pairs, and sums their softmax. Torch takes
a dozen operations, each of which writes and reads all scores.

Each head of a token has a query of its own.

Shapes: n queries, r ranks of a score, M rows of the grid (it has as many columns), K slots per head, P pairs of a
ranked row and a ranked column.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .library import routing_kernels
from .plain_tensors import has_plain_memory
from .top_k import top_experts


@dataclass(frozen=True, kw_only=True, eq=False)
class GridBest:
    """The K best places of each query, without gradient.

    Args:
        row_nK, column_nK: int64 places, best first.
        score_nK: their scores.
        part_2rnK: what the scores are made of: the parts of the chosen rows and columns.
        probability_2M: softmax over rows, and over columns, summed over valid queries.
        entropy: of both, summed over valid queries.
    """

    row_nK: Tensor
    column_nK: Tensor
    score_nK: Tensor
    part_2rnK: Tensor
    probability_2M: Tensor
    entropy: Tensor


class _Grid(ctypes.Structure):
    """`struct grid` of grid_best.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in "nrMKP"),
        *((name, ctypes.c_void_p) for name in ("part", "proxy", "core", "columns", "is_valid")),
        *((name, ctypes.c_void_p) for name in ("row", "column", "score", "picked", "total", "entropy")),
    )


def best_of_grid(
    part_2rnM: Tensor,
    proxy_2r: Tensor | None,
    core_rr: Tensor | None,
    columns: Sequence[int],
    is_valid_n: Tensor | None,
) -> GridBest:
    """The best K rows and columns of each query, and the best K of their pairs; equal ones by id, lowest first.

    Args:
        part_2rnM: of rows, then of columns; without gradient.
        proxy_2r: weights of the parts in the score of a row, and of a column; None if there is one part, the score.
        core_rr: a pair's score is bilinear in their parts by this; None if it is the sum of their scores.
        columns: with how many of the K best columns each of the K best rows is paired, the best row first; K or more
            pairs are scored in all, and K is at most M.
        is_valid_n: which queries count in the sums; None for all.
    """
    given = [tensor for tensor in (part_2rnM, proxy_2r, core_rr) if tensor is not None]
    is_plain = all(tensor.dtype == torch.float32 for tensor in given) and has_plain_memory(*given)
    if is_plain and (is_valid_n is None or has_plain_memory(is_valid_n)) and routing_kernels() is not None:
        return _by_c(part_2rnM, proxy_2r, core_rr, columns, is_valid_n)
    return _by_torch(part_2rnM, proxy_2r, core_rr, columns, is_valid_n)


def _by_c(
    part_2rnM: Tensor,
    proxy_2r: Tensor | None,
    core_rr: Tensor | None,
    columns: Sequence[int],
    is_valid_n: Tensor | None,
) -> GridBest:
    kernels = routing_kernels()
    assert kernels is not None
    part_2rnM = part_2rnM.contiguous()
    optional = [None if tensor is None else tensor.contiguous() for tensor in (proxy_2r, core_rr, is_valid_n)]
    (_, r, n, M), K = part_2rnM.shape, len(columns)
    place_2nK, score_nK = torch.empty(2, n, K, dtype=torch.int64), part_2rnM.new_empty(n, K)
    picked_2rnK, blocks = part_2rnM.new_empty(2, r, n, K), -(-n // kernels.expertier_grid_block())
    total, entropy = part_2rnM.new_empty(blocks, 2, M), part_2rnM.new_empty(blocks, dtype=torch.float64)
    proxy, core, is_valid = (None if tensor is None else tensor.data_ptr() for tensor in optional)
    counts = (ctypes.c_int64 * K)(*columns)
    made = (place_2nK[0], place_2nK[1], score_nK, picked_2rnK, total, entropy)
    grid = _Grid(
        *(n, r, M, K, sum(columns), part_2rnM.data_ptr(), proxy, core, ctypes.addressof(counts), is_valid),
        *(tensor.data_ptr() for tensor in made),
    )
    if kernels.expertier_grid_best(ctypes.byref(grid)):
        raise MemoryError(f"no memory to choose {K} of {M} rows and columns")
    return GridBest(
        row_nK=place_2nK[0],
        column_nK=place_2nK[1],
        score_nK=score_nK,
        part_2rnK=picked_2rnK,
        probability_2M=total.sum(dim=0),
        entropy=entropy.sum().to(part_2rnM.dtype),
    )


def _by_torch(
    part_2rnM: Tensor,
    proxy_2r: Tensor | None,
    core_rr: Tensor | None,
    columns: Sequence[int],
    is_valid_n: Tensor | None,
) -> GridBest:
    score_2nM = side_scores(part_2rnM, proxy_2r)
    K = len(columns)
    place_2nK = top_experts(score_2nM.flatten(0, 1), K).unflatten(0, score_2nM.shape[:2])
    best_2rnK = part_2rnM.gather(-1, place_2nK[:, None].expand(-1, part_2rnM.shape[1], -1, -1))
    pairs = [(row, column) for row, count in enumerate(columns) for column in range(count)]
    pair_2P = torch.tensor(pairs, device=part_2rnM.device).T
    score_nP = _pair_scores(best_2rnK, core_rr, pair_2P)
    chosen_nK = top_experts(score_nP, K)
    rank_2nK = pair_2P[:, chosen_nK]
    row_nK, column_nK = place_2nK.gather(-1, rank_2nK)
    if is_valid_n is not None:
        score_2nM = score_2nM[:, is_valid_n]
    share_2nM = score_2nM.softmax(dim=-1)
    return GridBest(
        row_nK=row_nK,
        column_nK=column_nK,
        score_nK=score_nP.gather(-1, chosen_nK),
        part_2rnK=best_2rnK.gather(-1, rank_2nK[:, None].expand_as(best_2rnK)),
        probability_2M=share_2nM.sum(dim=1),
        entropy=score_2nM.logsumexp(dim=-1).sum() - torch.dot(share_2nM.flatten(), score_2nM.flatten()),
    )


def side_scores(part_2rnM: Tensor, proxy_2r: Tensor | None) -> Tensor:
    """Scores [2, n, M] of rows and of columns from their parts, with gradient."""
    return part_2rnM[:, 0] if proxy_2r is None else torch.einsum("sr,srnm->snm", proxy_2r, part_2rnM)


def _pair_scores(best_2rnK: Tensor, core_rr: Tensor | None, pair_2P: Tensor) -> Tensor:
    row_rnK, column_rnK = best_2rnK
    if core_rr is None:
        return row_rnK[0].index_select(-1, pair_2P[0]) + column_rnK[0].index_select(-1, pair_2P[1])
    weighed_nKr = torch.einsum("rnk,rs->nks", row_rnK, core_rr)
    score_nKK = weighed_nKr @ column_rnK.transpose(0, 1)
    return score_nKK.flatten(1).index_select(-1, pair_2P[0] * best_2rnK.shape[-1] + pair_2P[1])
