"""Experts in levels: of a record, as much is read from its beginning as memory has room for.

A record begins with a head of 64 bytes: a mark and the number of its expert. Level after level follows, and in each
level the parts of all matrices. So the first levels are the beginning of the record, and one more is one more extent.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import torch

from routing.ground.hardware import Hardware

from ..checkpoint.experts import ExpertLayer
from ..codes.levels import LevelledScheme
from .form import Extent, MatrixEncoder
from .low_bit import stored_shape
from .packed import PackedForm
from .quantised_parts import rounded

MARK = b"levels01"
HEAD_BYTES = 64
"""Before the first level, so that it begins with a line of the cache."""
NUMBER_BYTES = 4
"""Of an expert's number in the head."""


@dataclass(frozen=True, eq=False)
class LevelledForm(PackedForm):
    """The experts of one layer.

    Args:
        scheme: of all its matrices.
        depth_E: levels that are read of each expert, at least one.
        is_transposed: whether the model's parameters have inputs as rows.
    """

    scheme: LevelledScheme | None = None
    depth_E: tuple[int, ...] = ()
    is_transposed: bool = False

    name: ClassVar[str] = "levels"
    linears: ClassVar[MatrixEncoder | None] = None
    reaches_gpu: ClassVar[bool] = False
    is_expanded: ClassVar[bool] = True

    @property
    def guard_bytes(self) -> int:
        """Parts are read to their end and no further."""
        return 0

    @cached_property
    def level_ends(self) -> tuple[int, ...]:
        """Bytes of a record up to the end of each level."""
        assert self.scheme is not None
        return level_ends(self.layer, self.scheme, is_transposed=self.is_transposed)

    def described(self, scheme: LevelledScheme, *, is_transposed: bool) -> "LevelledForm":
        """The form with what the index says of its records; all levels are read.

        Raises:
            ValueError: if a record has another size than its levels make.
        """
        found = replace(self, scheme=scheme, depth_E=(scheme.levels,) * len(self.record_E), is_transposed=is_transposed)
        if any(record.nbytes != found.level_ends[-1] for record in self.record_E):
            raise ValueError(f"an expert stored as {scheme.name} has {found.level_ends[-1]} bytes; others are there")
        return found

    def to_depth(self, depth_E: Sequence[int]) -> "LevelledForm":
        """The same records, read to these levels."""
        records = tuple(
            replace(record, nbytes=self.level_ends[depth - 1], shape=(self.level_ends[depth - 1],))
            for record, depth in zip(self.record_E, depth_E, strict=True)
        )
        return replace(self, record_E=records, depth_E=tuple(depth_E))

    def deeper(self, expert: int) -> Extent | None:
        """What makes an expert one level finer; None at the last."""
        depth = self.depth_E[expert]
        if depth == len(self.level_ends):
            return None
        begin, end = self.level_ends[depth - 1 : depth + 1]
        record = self.record_E[expert]
        return Extent(record, record.offset + begin, end - begin, 0, begin)

    def views(self, slot: torch.Tensor, shifts: Sequence[int]) -> dict[str, Any]:
        """The record, which says whose it is once it is there; parameters share it."""
        return {parameter.name: slot[shifts[0] :] for parameter in self.layer.parameters}

    def check(self, expert: int, slot: torch.Tensor) -> None:
        """Refuse a head of another expert, whose levels may not be there.

        Raises:
            OSError: if it is.
        """
        if bytes(slot[:HEAD_BYTES].numpy()) != head(expert):
            raise OSError(
                f"{self.file_of(expert)}: the record of expert {expert} is another's; make it again with "
                "`expertier pack`"
            )

    def expand(self, views: Mapping[str, Any], room: Mapping[str, torch.Tensor]) -> None:
        record = next(iter(views.values()))
        expert = int.from_bytes(bytes(record[len(MARK) : len(MARK) + NUMBER_BYTES].numpy()), "little")
        for name, w_OC in self.matrices(record, self.depth_E[expert]).items():
            room[name].copy_(w_OC.t() if self.is_transposed else w_OC)

    def matrices(self, record: torch.Tensor, depth: int) -> dict[str, torch.Tensor]:
        """Each matrix from its first levels, outputs as rows, float32."""
        assert self.scheme is not None
        found: dict[str, list[dict[str, torch.Tensor]]] = {parameter.name: [] for parameter in self.layer.parameters}
        start = HEAD_BYTES
        for level in range(depth):
            for parameter in self.layer.parameters:
                shape = stored_shape(parameter, is_transposed=self.is_transposed)
                parts = {}
                for role, nbytes in self.scheme.part_bytes(level, *shape).items():
                    parts[role] = record[start : start + nbytes]
                    start += rounded(nbytes)
                found[parameter.name].append(parts)
        return {
            parameter.name: self.scheme.decode(
                found[parameter.name], *stored_shape(parameter, is_transposed=self.is_transposed)
            )
            for parameter in self.layer.parameters
        }

    def token_rate(self, hardware: Hardware, *, is_fast: bool) -> float:
        return hardware.exact_bytes_per_s * self.expert_bytes / self.layer.plain_bytes

    @classmethod
    def suits(cls, layer: ExpertLayer, views: Mapping[str, torch.Tensor]) -> bool:
        """Never by itself: levels lose something, and have to be asked for."""
        return False

    @classmethod
    def encode(cls, layer: ExpertLayer, views: Mapping[str, torch.Tensor]) -> list[bytes]:
        raise NotImplementedError("levels are written by offload/lowbit")

    @classmethod
    def record_bounds(cls, layer: ExpertLayer) -> tuple[int, int]:
        """A head, and anything up to four times the plain size; `described` knows the exact bytes."""
        return HEAD_BYTES, HEAD_BYTES + 4 * layer.plain_bytes


def level_ends(layer: ExpertLayer, scheme: LevelledScheme, *, is_transposed: bool) -> tuple[int, ...]:
    """Bytes of a record up to the end of each level."""
    ends, end = [], HEAD_BYTES
    for level in range(scheme.levels):
        for parameter in layer.parameters:
            parts = scheme.part_bytes(level, *stored_shape(parameter, is_transposed=is_transposed))
            end += sum(map(rounded, parts.values()))
        ends.append(end)
    return tuple(ends)


def head(expert: int) -> bytes:
    """The first bytes of a record."""
    return (MARK + expert.to_bytes(NUMBER_BYTES, "little")).ljust(HEAD_BYTES, b"\0")


def record_of(expert: int, levels_M: Sequence[Sequence[Mapping[str, torch.Tensor]]]) -> bytes:
    """The bytes of a record.

    Args:
        expert: its number.
        levels_M: of each matrix, in the order of the layer's parameters, the parts of each level.
    """
    parts = [
        part.numpy().tobytes() for level in zip(*levels_M, strict=True) for matrix in level for part in matrix.values()
    ]
    return head(expert) + b"".join(part.ljust(rounded(len(part)), b"\0") for part in parts)
