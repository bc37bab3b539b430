"""A quantised matrix in memory: its stored parts, and what expands them."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .decode import decode
from .encoding import Encoding
from .expander import expand


@dataclass(frozen=True, kw_only=True, eq=False)
class StoredMatrix:
    """Rows of a matrix, as they are stored.

    Args:
        encoding: what the bytes mean.
        rows: of the stored matrix, outputs of the product.
        columns: of the stored matrix, inputs of the product.
        parts: uint8 and contiguous, by role.
    """

    encoding: Encoding
    rows: int
    columns: int
    parts: Mapping[str, torch.Tensor]

    @property
    def nbytes(self) -> int:
        """Of all parts."""
        return sum(part.nbytes for part in self.parts.values())

    def expand(self, out: torch.Tensor, *, is_transposed: bool = False) -> None:
        """Write the matrix as the owner of the format would, rounded to the dtype of `out`.

        Args:
            out: contiguous; `[columns, rows]` if `is_transposed`, else `[rows, columns]`.
            is_transposed: write the transpose.
        """
        shape = self.rows, self.columns
        if out.dtype == torch.bfloat16 and expand(self.encoding, self.parts, *shape, out, is_transposed=is_transposed):
            return
        plain = decode(self.encoding, self.parts, *shape, out.dtype)
        out.copy_(plain.t() if is_transposed else plain)
