"""Experts that `expertier pack` quantised: records whose matrices have a scheme each, in a layer alike or not.

A record begins with a head of 64 bytes: a mark, and for each matrix the number of its scheme in the layer's list. The
parts of the matrices follow, each on a whole multiple of 64 bytes. Outputs are rows, whatever way the model has them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import torch

from ...checkpoint.experts import ExpertLayer, Parameter
from ...checkpoint.tensors import TORCH_DTYPES
from ...codes.encoding import Encoding
from ...codes.expander import has_exact_kernel
from ...codes.schemes import Scheme
from ...codes.stored_matrix import StoredMatrix
from ...native.kernel_matrix import KernelMatrix
from ..quantised_parts import rounded
from .form import LossyForm

MARK = b"lowbits1"
HEAD_BYTES = 64
"""Before the first matrix, so that it begins with a line of the cache."""
DTYPE_NAMES = {name: stored for stored, name in TORCH_DTYPES.items()}

SchemeNames = tuple[str, ...]
"""Of the matrices of an expert, in the order of the layer's parameters."""


@dataclass(frozen=True, eq=False)
class LowBitForm(LossyForm):
    """The experts of one layer.

    Args:
        schemes_E: names of each expert's schemes.
        is_transposed: whether the model's parameters have inputs as rows.
    """

    schemes_E: tuple[SchemeNames, ...] = ()

    name: ClassVar[str] = "lowbit"

    @cached_property
    def names(self) -> SchemeNames:
        """All schemes of the layer; a record's head numbers them."""
        return scheme_list(self.schemes_E)

    @cached_property
    def is_uniform(self) -> bool:
        """Whether all experts have the same schemes, so that one call of C computes several."""
        return len(set(self.schemes_E)) == 1

    def views(self, slot: torch.Tensor, shifts: Sequence[int]) -> dict[str, Any]:
        """The record, which says what it holds once it is there; parameters share it."""
        record = slot[shifts[0] :]
        return {parameter.name: record for parameter in self.layer.parameters}

    def can_multiply(self, *, is_transposed: bool) -> bool:
        matrices = self._matrices(self._no_bytes, self.schemes_E[0]).values()
        return self.is_uniform and all(
            isinstance(matrix.encoding, Encoding) and has_exact_kernel(matrix.encoding) for matrix in matrices
        )

    def kernel_matrices(self, views: Mapping[str, Any], expert: int) -> dict[str, tuple[KernelMatrix, ...]]:
        if not self.can_multiply(is_transposed=self.is_transposed):
            return {}
        record = next(iter(views.values()))
        matrices = self._matrices(record, self.schemes_E[0])
        return {name: (matrix.kernel_matrix(),) for name, matrix in matrices.items()}

    def check(self, expert: int, slot: torch.Tensor) -> None:
        """Refuse a head that is not what the index says, which would be read as other bytes than there are.

        Raises:
            OSError: if it is.
        """
        if bytes(slot[:HEAD_BYTES].numpy()) != head(self.schemes_E[expert], self.names):
            raise OSError(
                f"{self.file_of(expert)}: expert {expert} is not stored as the index says; make it again with "
                "`expertier pack`"
            )

    def expand(self, views: Mapping[str, Any], room: Mapping[str, torch.Tensor]) -> None:
        record = next(iter(views.values()))
        for name, matrix in self.matrices(record).items():
            matrix.expand(room[name], is_transposed=self.is_transposed)

    def matrices(self, record: torch.Tensor) -> dict[str, StoredMatrix]:
        """What a complete record holds, by parameter."""
        numbers = record[len(MARK) : len(MARK) + len(self.layer.parameters)].tolist()
        return self._matrices(record, tuple(self.names[number] for number in numbers))

    @classmethod
    def record_bounds(cls, layer: ExpertLayer) -> tuple[int, int]:
        """A head, and anything up to the plain size; `described` knows the exact bytes."""
        return HEAD_BYTES, HEAD_BYTES + 2 * layer.plain_bytes

    def described(self, schemes_E: Sequence[SchemeNames], *, is_transposed: bool) -> "LowBitForm":
        """The form with what the index says of its records.

        Raises:
            ValueError: if a record has another size than its schemes make.
        """
        found = replace(self, schemes_E=tuple(schemes_E), is_transposed=is_transposed)
        for record, names in zip(self.record_E, found.schemes_E, strict=True):
            if record.nbytes != (nbytes := record_bytes(self.layer, names, is_transposed=is_transposed)):
                raise ValueError(f"an expert stored as {', '.join(names)} has {nbytes} bytes; got {record.nbytes}")
        return found

    @property
    def _no_bytes(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def _matrices(self, record: torch.Tensor, names: SchemeNames) -> dict[str, StoredMatrix]:
        found, start = {}, HEAD_BYTES
        for parameter, name in zip(self.layer.parameters, names, strict=True):
            rows, columns = stored_shape(parameter, is_transposed=self.is_transposed)
            encoding = Scheme.named(name).encoding(DTYPE_NAMES[str(parameter.dtype).removeprefix("torch.")])
            parts = {}
            for role, nbytes in encoding.part_bytes(rows, columns).items():
                parts[role] = record[start : start + nbytes]
                start += rounded(nbytes)
            found[parameter.name] = StoredMatrix(encoding=encoding, rows=rows, columns=columns, parts=parts)
        return found


def stored_shape(parameter: Parameter, *, is_transposed: bool) -> tuple[int, int]:
    """Rows (outputs) and columns (inputs) of a parameter's stored matrix.

    Raises:
        ValueError: if it is no matrix.
    """
    if len(parameter.shape) != 2:
        raise ValueError(f"{parameter.full_name} {list(parameter.shape)}: only matrices are quantised")
    first, second = parameter.shape
    return (second, first) if is_transposed else (first, second)


def record_bytes(layer: ExpertLayer, names: SchemeNames, *, is_transposed: bool) -> int:
    """Of an expert whose matrices have these schemes."""
    return HEAD_BYTES + sum(
        matrix_bytes(parameter, Scheme.named(name), is_transposed=is_transposed)
        for parameter, name in zip(layer.parameters, names, strict=True)
    )


def matrix_bytes(parameter: Parameter, scheme: Scheme, *, is_transposed: bool) -> int:
    """What a matrix adds to a record."""
    encoding = scheme.encoding(DTYPE_NAMES[str(parameter.dtype).removeprefix("torch.")])
    parts = encoding.part_bytes(*stored_shape(parameter, is_transposed=is_transposed))
    return sum(rounded(nbytes) for nbytes in parts.values())


def scheme_list(schemes_E: Sequence[SchemeNames]) -> SchemeNames:
    """All schemes that experts have, in alphabetical order: the numbers of a head."""
    return tuple(sorted({name for names in schemes_E for name in names}))


def head(names: SchemeNames, all_names: SchemeNames) -> bytes:
    """The first bytes of a record."""
    return (MARK + bytes(all_names.index(name) for name in names)).ljust(HEAD_BYTES, b"\0")


def record_of(matrices: Sequence[StoredMatrix], names: SchemeNames, all_names: SchemeNames) -> bytes:
    """The bytes of a record."""
    parts = [part.numpy().tobytes() for matrix in matrices for part in matrix.parts.values()]
    return head(names, all_names) + b"".join(part.ljust(rounded(len(part)), b"\0") for part in parts)
