"""Experts of ternary weights in words of variable length: records that differ in size from expert to expert.

A record begins with a head of 64 bytes: a mark, and for each matrix its number of words and that of its dictionary. The
parts of the matrices follow, each on a whole multiple of 64 bytes. Outputs are rows, whatever way the model has them.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch

from routing.ground.hardware import Hardware

from ...checkpoint.experts import ExpertLayer, Parameter
from ...codes.ternary import ZERO_SHARES, expand, has_whole_rows, kernel_matrix_of, most_words, part_bytes
from ...native.kernel_matrix import KernelMatrix
from ..quantised_parts import rounded
from .form import LossyForm
from .low_bit import stored_shape

MARK = b"ternary1"
HEAD_BYTES = 64
"""Before the first matrix, so that it begins with a line of the cache."""
NUMBERS = np.dtype("<u4")
"""Of the numbers of a head, two for each matrix."""


@dataclass(frozen=True, eq=False)
class TernaryForm(LossyForm):
    """The experts of one layer.

    Args:
        is_transposed: whether the model's parameters have inputs as rows.
    """

    name: ClassVar[str] = "ternary"

    def described(self, *, is_transposed: bool) -> "TernaryForm":
        """The form with what the index says of its records."""
        return replace(self, is_transposed=is_transposed)

    def views(self, slot: torch.Tensor, shifts: Sequence[int]) -> dict[str, Any]:
        """The record, which says what it holds once it is there; parameters share it."""
        return {parameter.name: slot[shifts[0] :] for parameter in self.layer.parameters}

    def check(self, expert: int, slot: torch.Tensor) -> None:
        """Refuse a record whose matrices or rows would reach beyond it: our C does not look again.

        Raises:
            OSError: if they would.
        """
        told = self._head(slot)
        is_known = bytes(slot[: len(MARK)].numpy()) == MARK and all(number < len(ZERO_SHARES) for _, number in told)
        is_known = is_known and self._record_bytes([words for words, _ in told]) == self.stored_bytes(expert)
        if not (is_known and all(has_whole_rows(parts) for _, _, parts in self._matrices(slot))):
            raise OSError(
                f"{self.file_of(expert)}: expert {expert} is not stored as its record says; make it again with "
                "`expertier pack`"
            )

    def expand(self, views: Mapping[str, Any], room: Mapping[str, torch.Tensor]) -> None:
        for parameter, number, parts in self._matrices(next(iter(views.values()))):
            expand(number, parts, room[parameter.name], is_transposed=self.is_transposed)

    def can_multiply(self, *, is_transposed: bool) -> bool:
        """Our C reads rows of outputs, whatever way the model has them."""
        return all(parameter.dtype == torch.bfloat16 for parameter in self.layer.parameters)

    def kernel_matrices(self, views: Mapping[str, Any], expert: int) -> dict[str, tuple[KernelMatrix, ...]]:
        if not self.can_multiply(is_transposed=self.is_transposed):
            return {}
        return {
            parameter.name: (kernel_matrix_of(number, parts, *self._shape(parameter)),)
            for parameter, number, parts in self._matrices(next(iter(views.values())))
        }

    def token_rate(self, hardware: Hardware, *, is_fast: bool) -> float:
        return hardware.exact_bytes_per_s * self.expert_bytes / self.layer.plain_bytes

    @classmethod
    def record_bounds(cls, layer: ExpertLayer) -> tuple[int, int]:
        """A head, and anything up to a word for each pair of weights, whichever side has the rows."""
        most = sum(
            max(
                sum(map(rounded, part_bytes(rows, most_words(rows, columns)).values()))
                for rows, columns in (stored_shape(parameter, is_transposed=turned) for turned in (False, True))
            )
            for parameter in layer.parameters
        )
        return HEAD_BYTES, HEAD_BYTES + most

    def _shape(self, parameter: Parameter) -> tuple[int, int]:
        return stored_shape(parameter, is_transposed=self.is_transposed)

    def _matrices(self, record: torch.Tensor) -> Iterator[tuple[Parameter, int, dict[str, torch.Tensor]]]:
        """Each matrix, its dictionary, and its parts."""
        start = HEAD_BYTES
        for parameter, (words, number) in zip(self.layer.parameters, self._head(record), strict=True):
            parts = {}
            for role, nbytes in part_bytes(self._shape(parameter)[0], words).items():
                parts[role] = record[start : start + nbytes]
                start += rounded(nbytes)
            yield parameter, number, parts

    def _head(self, record: torch.Tensor) -> list[tuple[int, int]]:
        """Words and dictionary of each matrix."""
        stored = bytes(record[len(MARK) : HEAD_BYTES].numpy())
        numbers = np.frombuffer(stored, NUMBERS).tolist()
        return [(numbers[2 * place], numbers[2 * place + 1]) for place in range(len(self.layer.parameters))]

    def _record_bytes(self, words_M: Sequence[int]) -> int:
        """Of an expert whose matrices have so many words."""
        parts = [
            part_bytes(self._shape(parameter)[0], words)
            for parameter, words in zip(self.layer.parameters, words_M, strict=True)
        ]
        return HEAD_BYTES + sum(rounded(nbytes) for each in parts for nbytes in each.values())


def record_of(matrices: Sequence[tuple[int, Mapping[str, torch.Tensor]]]) -> bytes:
    """The bytes of a record.

    Args:
        matrices: dictionary and parts of each, in the order of the layer's parameters.
    """
    told = [(parts["words"].numel() // 2, number) for number, parts in matrices]
    head = MARK + np.array(told, NUMBERS).tobytes()
    parts = [part.numpy().tobytes() for _, parts in matrices for part in parts.values()]
    return head.ljust(HEAD_BYTES, b"\0") + b"".join(part.ljust(rounded(len(part)), b"\0") for part in parts)
