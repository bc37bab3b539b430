"""A quantised matrix in memory: its stored parts, and what expands them."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..native.kernel_matrix import KernelMatrix
from .decode import decode
from .encoding import Encoding
from .expander import expand, kernel_matrix_of
from .hqq import HqqEncoding
from .nested import NestedEncoding
from .turned import TurnedEncoding

AnyEncoding = Encoding | TurnedEncoding | NestedEncoding | HqqEncoding
"""The others become the first when they are expanded or packed, where their groups are runs of rows."""


@dataclass(frozen=True, kw_only=True, eq=False)
class StoredMatrix:
    """Rows of a matrix, as they are stored.

    Args:
        encoding: what the bytes mean.
        rows: of the stored matrix, outputs of the product.
        columns: of the stored matrix, inputs of the product.
        parts: uint8 and contiguous, by role.
    """

    encoding: AnyEncoding
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
        shape, encoding, parts = (self.rows, self.columns), self.encoding, self.parts
        if not isinstance(encoding, Encoding):
            if encoding.is_in_order(parts, self.columns):
                self.packed().expand(out, is_transposed=is_transposed)
                return
            plain = encoding.decode(parts, *shape, out.dtype)
        elif out.dtype == torch.bfloat16 and expand(encoding, parts, *shape, out, is_transposed=is_transposed):
            return
        else:
            plain = decode(encoding, parts, *shape, out.dtype)
        out.copy_(plain.t() if is_transposed else plain)

    def kernel_matrix(self) -> KernelMatrix:
        """As our C multiplies it, if it `has_exact_kernel`."""
        assert isinstance(self.encoding, Encoding)
        return kernel_matrix_of(self.encoding, self.rows, self.columns, self.parts)

    def packed(self) -> "StoredMatrix":
        """The matrix as a packed copy stores it.

        Raises:
            ValueError: if weights of a group are not neighbours in a row, and no index says whose they are.
        """
        if isinstance(self.encoding, Encoding):
            return self
        if not (self.encoding.packed.has_order or self.encoding.is_in_order(self.parts, self.columns)):
            raise ValueError(
                "weights of a group are not neighbours in a row (columns sorted by activation without desc_act in the "
                "config, or axis 0 of HQQ), which a packed copy does not store; load the checkpoint without one"
            )
        parts = self.encoding.turn(self.parts, self.rows, self.columns)
        return StoredMatrix(encoding=self.encoding.packed, rows=self.rows, columns=self.columns, parts=parts)
