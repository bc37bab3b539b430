"""Factorisation of a group of matrices over one shared basis, in float64, with its exact error.

Shapes: E experts of one group, F rows, D columns.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Whitening:
    """Coordinates in which every direction of the inputs counts as much as it occurs.

    Args:
        root_DD: C^(1/2) of the inputs' second moments C.
        inverse_DD: its inverse.
    """

    root_DD: Tensor
    inverse_DD: Tensor

    @classmethod
    def of(cls, moment_DD: Tensor, ridge: float = 1e-6) -> "Whitening":
        """From second moments; `ridge`, in units of their mean, keeps directions that never occurred invertible."""
        D = len(moment_DD)
        moment_DD = moment_DD.double()
        scale = moment_DD.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
        value_D, vector_DD = torch.linalg.eigh(moment_DD / scale)
        root_D = (value_D.clamp_min(0) + ridge).sqrt()
        assert root_D.shape == (D,)
        return cls((vector_DD * root_D) @ vector_DD.T, (vector_DD / root_D) @ vector_DD.T)


@dataclass(frozen=True, eq=False)
class Factors:
    """`matrix_e ~ left_e @ basis`.

    Args:
        left: what stays with each matrix.
        basis: what they share.
        error: squared Frobenius norm of what the basis leaves out, measured.
        tail: the same from the singular values of the stack: the sum of the squares after the first `rank`.
        truncation_error, truncation_tail: the same for the rank reduction of each matrix before, summed.
        norm: squared Frobenius norm of the matrices.
        All five in whitened coordinates if there is a whitening.
    """

    left: Tensor
    basis: Tensor
    error: float
    tail: float
    truncation_error: float
    truncation_tail: float
    norm: float


def factorise(
    matrix_EFD: Tensor, rank: int, *, matrix_rank: int | None = None, whitening: Whitening | None = None
) -> Factors:
    """The best factors of given rank over one basis (orthonormal in whitened coordinates).

    At full rank the basis is the identity and the factors are the matrices themselves, bit for bit.

    Args:
        matrix_EFD: the matrices of one group.
        rank: of the basis, at most D.
        matrix_rank: each matrix is first replaced by its best approximation of this rank; None leaves it.
        whitening: minimise the error on inputs with these moments instead of the plain one.

    Source: Eckart and Young 1936; Liu et al. 2025 (MoLAE), arXiv:2503.23100, section 4.
    """
    D = matrix_EFD.shape[-1]
    exact = matrix_EFD.double()
    white = exact if whitening is None else exact @ whitening.root_DD
    kept, truncation_error, truncation_tail = white, 0.0, 0.0
    if matrix_rank is not None and matrix_rank < min(matrix_EFD.shape[1:]):
        kept, truncation_tail = truncate(white, matrix_rank)
        truncation_error = float((white - kept).square().sum())
    facts = {"truncation_error": truncation_error, "truncation_tail": truncation_tail, "norm": _square(white)}
    if rank == D:
        left = kept if whitening is None or kept is white else kept @ whitening.inverse_DD
        left = exact if kept is white else left
        return Factors(left, torch.eye(D, dtype=torch.float64, device=exact.device), 0.0, 0.0, **facts)
    stack = kept.flatten(0, 1)
    value_D, vector_DD = torch.linalg.eigh(stack.T @ stack)
    basis = vector_DD[:, -rank:].T.flip(0)
    left = kept @ basis.T
    error = float((kept - left @ basis).square().sum())
    tail = float(value_D[:-rank].clamp_min(0).sum())
    basis = basis if whitening is None else basis @ whitening.inverse_DD
    return Factors(left, basis, error, tail, **facts)


def truncate(matrix_EFD: Tensor, rank: int) -> tuple[Tensor, float]:
    """Each matrix's best approximation of that rank, and the sum of the squared singular values left out."""
    kept, tail = [], 0.0
    for matrix in matrix_EFD:
        is_tall = matrix.shape[0] > matrix.shape[1]
        value, vector = torch.linalg.eigh(matrix.T @ matrix if is_tall else matrix @ matrix.T)
        best = vector[:, -rank:]
        kept.append(matrix @ best @ best.T if is_tall else best @ (best.T @ matrix))
        tail += float(value[:-rank].clamp_min(0).sum())
    return torch.stack(kept), tail


def _square(x: Tensor) -> float:
    return float(x.square().sum())
