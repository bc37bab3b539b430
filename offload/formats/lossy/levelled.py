"""Experts in levels: of a record, as much is read from its beginning as memory has room for.

A record begins with a head of 64 bytes: a mark and the number of its expert. Level after level follows, and in each
level the parts of all matrices. So the first levels are the beginning of the record, and one more is one more extent.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch.nn.functional import pad

from routing.ground.hardware import Hardware

from ...checkpoint.experts import ExpertLayer, Parameter
from ...codes.expander import block_parameters, expand_matrix, kernel_number, kernel_parameters
from ...codes.levels import LevelledScheme
from ...native.kernel_matrix import BLOCKS, MOST_PLANES, PARTS, KernelMatrix
from ..form import BLOCK_BYTES, Extent
from ..quantised_parts import rounded
from .form import LossyForm
from .low_bit import stored_shape

MARK = b"levels01"
HEAD_BYTES = 64
"""Before the first level, so that it begins with a line of the cache."""
NUMBER_BYTES = 4
"""Of an expert's number in the head."""


@dataclass(frozen=True, eq=False)
class LevelledForm(LossyForm):
    """The experts of one layer.

    Args:
        scheme: of all its matrices.
        depth_E: levels that are computed with of each expert, at least one; as many are read, but of `base`.
        is_transposed: whether the model's parameters have inputs as rows.
    """

    scheme: LevelledScheme | None = None
    depth_E: tuple[int, ...] = ()

    name: ClassVar[str] = "levels"

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

    def base(self) -> "LevelledForm":
        """The same records, of which slots hold the first level; what is there of the others is read besides."""
        return replace(self.to_depth((1,) * len(self.record_E)), depth_E=(len(self.level_ends),) * len(self.record_E))

    def level_extent(self, expert: int, level: int) -> Extent:
        """Where a level of an expert is, the first being level 0; it fills its place from the first byte on."""
        begin, end = self._level_bounds(level)
        record = self.record_E[expert]
        return Extent(record, record.offset + begin, end - begin, 0, 0)

    def level_room(self, level: int) -> int:
        """Bytes of the blocks that a level reaches into: memory that it can be read to without a copy."""
        begin, end = self._level_bounds(level)
        return -(-end // BLOCK_BYTES) * BLOCK_BYTES - begin // BLOCK_BYTES * BLOCK_BYTES

    def views(self, slot: torch.Tensor, shifts: Sequence[int]) -> dict[str, Any]:
        """The levels that fit in a slot; the first says whose they are once it is there. Parameters share them."""
        record = slot[shifts[0] :]
        bounds = [self._level_bounds(level) for level in range(len(self.level_ends))]
        return self.views_of([record[begin:end] for begin, end in bounds if end <= len(record)])

    def views_of(self, levels: Sequence[torch.Tensor]) -> dict[str, Any]:
        """The same of levels that lie anywhere in memory."""
        return {parameter.name: levels for parameter in self.layer.parameters}

    def _level_bounds(self, level: int) -> tuple[int, int]:
        return (0, *self.level_ends)[level], self.level_ends[level]

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
        levels = next(iter(views.values()))
        expert = int.from_bytes(bytes(levels[0][len(MARK) : len(MARK) + NUMBER_BYTES].numpy()), "little")
        kernels = self.kernel_matrices(views, expert)
        if kernels and all(
            expand_matrix(pieces[0], room[name], is_transposed=self.is_transposed) for name, pieces in kernels.items()
        ):
            return
        for name, w_OC in self.matrices(levels[: self.depth_E[expert]]).items():
            room[name].copy_(w_OC.t() if self.is_transposed else w_OC)

    def can_multiply(self, *, is_transposed: bool) -> bool:
        """Planes and residual blocks, as many as our C adds."""
        assert self.scheme is not None
        is_known = self.scheme.levels <= (1 + MOST_PLANES if self.scheme.kind == "planes" else PARTS)
        return is_known and all(parameter.dtype == torch.bfloat16 for parameter in self.layer.parameters)

    def kernel_matrices(self, views: Mapping[str, Any], expert: int) -> dict[str, tuple[KernelMatrix, ...]]:
        if not self.can_multiply(is_transposed=self.is_transposed):
            return {}
        assert self.scheme is not None
        levels = next(iter(views.values()))[: self.depth_E[expert]]
        found: dict[str, tuple[KernelMatrix, ...]] = {}
        for parameter, parts_V in self._parts(levels):
            shape = stored_shape(parameter, is_transposed=self.is_transposed)
            if self.scheme.kind == "residual":
                levels_at = [parts["codes"].data_ptr() for parts in parts_V]
                found[parameter.name] = (KernelMatrix(BLOCKS, *shape, block_parameters(self.scheme.size), *levels_at),)
                continue
            base, *planes = parts_V
            addresses = [*(base[role].data_ptr() for role in ("codes", "scales", "zeros")), 0]
            addresses += [plane["codes"].data_ptr() for plane in planes]
            parameters = kernel_parameters(self.scheme.base, shape[1], is_sum=True)
            kernel = KernelMatrix(kernel_number(self.scheme.base), *shape, parameters, *addresses)
            found[parameter.name] = (kernel,)
        return found

    def token_rate(self, hardware: Hardware, *, is_fast: bool) -> float:
        """Residual blocks are bound by the arithmetic of their ranks, which is not measured: as if expanded."""
        assert self.scheme is not None
        if self.scheme.kind == "residual":
            return hardware.exact_bytes_per_s * self.expert_bytes / self.layer.plain_bytes
        return super().token_rate(hardware, is_fast=is_fast)

    def matrices(self, levels: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Each matrix from its first levels, outputs as rows, float32."""
        assert self.scheme is not None
        return {
            parameter.name: self.scheme.decode(parts_V, *stored_shape(parameter, is_transposed=self.is_transposed))
            for parameter, parts_V in self._parts(levels)
        }

    def _parts(self, levels: Sequence[torch.Tensor]) -> Iterator[tuple[Parameter, list[dict[str, torch.Tensor]]]]:
        """Each matrix, and its parts of each level."""
        assert self.scheme is not None
        starts = [HEAD_BYTES, *[0] * (len(levels) - 1)]
        for parameter in self.layer.parameters:
            shape, parts_V = stored_shape(parameter, is_transposed=self.is_transposed), []
            for level, stored in enumerate(levels):
                parts = {}
                for role, nbytes in self.scheme.part_bytes(level, *shape).items():
                    parts[role] = stored[starts[level] : starts[level] + nbytes]
                    starts[level] += rounded(nbytes)
                parts_V.append(parts)
            yield parameter, parts_V

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
    matrices = [matrix for level in zip(*levels_M, strict=True) for matrix in level]
    return head(expert) + b"".join(joined(matrix).numpy().tobytes() for matrix in matrices)


def joined(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The parts of one level of a matrix as they lie in a record, each on a whole multiple of 64 bytes."""
    return torch.cat([pad(part, (0, rounded(part.numel()) - part.numel())) for part in parts.values()])
