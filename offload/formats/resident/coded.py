"""Linear layers that a checkpoint stores as codes, as matrices in memory."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ...checkpoint.quantised.entry import QuantisedEntry
from ...checkpoint.tensors import TensorEntry
from ...codes.encoding import Encoding
from ...codes.expander import has_exact_kernel
from ...codes.stored_matrix import StoredMatrix
from ...native.kernel_matrix import KernelMatrix
from .linears import StoredLinear, aligned

Matches = Mapping[str, Sequence[tuple[str, str | None]]]


@dataclass(frozen=True)
class CodedMatrix:
    """A matrix `[rows, columns]` as its codes and companions, each on a multiple of 64 bytes.

    Args:
        encoding: what they mean; one that `has_exact_kernel`.
    """

    encoding: Encoding
    rows: int
    columns: int

    @property
    def name(self) -> str:
        return self.encoding.form

    @property
    def nbytes(self) -> int:
        """Of all parts."""
        return sum(map(aligned, self.encoding.part_bytes(self.rows, self.columns).values()))

    def join(self, matrix: StoredMatrix) -> torch.Tensor:
        """The parts of a matrix of this encoding, one after the other."""
        stored = torch.empty(self.nbytes, dtype=torch.uint8)
        for role, part in self._parts(stored).items():
            part.copy_(matrix.parts[role])
        return stored

    def expand(self, stored: torch.Tensor, out_FD: torch.Tensor) -> None:
        self._matrix(stored).expand(out_FD)

    def kernel_matrix(self, stored: torch.Tensor, shape: tuple[int, int]) -> KernelMatrix | None:
        return self._matrix(stored).kernel_matrix()

    def _matrix(self, stored: torch.Tensor) -> StoredMatrix:
        return StoredMatrix(encoding=self.encoding, rows=self.rows, columns=self.columns, parts=self._parts(stored))

    def _parts(self, stored: torch.Tensor) -> dict[str, torch.Tensor]:
        parts, start = {}, 0
        for role, nbytes in self.encoding.part_bytes(self.rows, self.columns).items():
            parts[role] = stored[start : start + nbytes]
            start += aligned(nbytes)
        return parts


def coded_linear(name: str, entries: Mapping[str, TensorEntry], found: Matches) -> StoredLinear | None:
    """A parameter that is one matrix of codes, in rows; None if it is something else.

    Args:
        name: full name of the parameter.
        entries: the checkpoint's tensors.
        found: what `match_checkpoint` says of the model and them.
    """
    keys = found.get(name, ())
    if len(keys) != 1 or keys[0][1] is not None:
        return None
    entry = entries[keys[0][0]]
    if not isinstance(entry, QuantisedEntry) or entry.is_transposed or len(entry.shape) != 2:
        return None
    form = CodedMatrix(entry.encoding.packed, entry.rows, entry.columns)
    if not has_exact_kernel(form.encoding) or not entry.is_in_rows():
        return None
    return StoredLinear(form, entry.shape, form.nbytes, lambda: form.join(entry.read(0).packed()))
