"""Experts stored as the model computes with them: straight from a checkpoint's files, or from a packed copy."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any, ClassVar

import torch

from routing.ground.hardware import Hardware

from ..checkpoint.experts import ExpertLayer, Parameter, Source, convert_expert
from ..checkpoint.tensors import TORCH_DTYPES, TensorEntry
from ..native.kernel_matrix import KernelMatrix, plain_matrix
from .form import BLOCK_BYTES, Extent, MatrixEncoder, PartReader, Region

DTYPE_NAMES = {name: stored for stored, name in TORCH_DTYPES.items()}


@dataclass(frozen=True, eq=False)
class PlainForm:
    """The experts of one layer as the model computes with them.

    Parameters that follow each other in the file share a region, so that one read fills them. A region that one extent
    fills can be read with O_DIRECT without a copy: its data is shifted to the extent's place within a file block.
    """

    layer: ExpertLayer

    name: ClassVar[str] = "plain"
    linears: ClassVar[MatrixEncoder | None] = None
    reaches_gpu: ClassVar[bool] = True
    is_expanded: ClassVar[bool] = False

    @cached_property
    def parameters(self) -> tuple[Parameter, ...]:
        """In the order in which they lie in the file."""
        return tuple(sorted(self.layer.parameters, key=_first_byte))

    @property
    def expert_bytes(self) -> int:
        return self.layer.plain_bytes

    @property
    def own_slot_bytes(self) -> tuple[int, ...]:
        """Experts are alike."""
        return (self.slot_bytes,) * self.layer.num_experts

    @property
    def guard_bytes(self) -> int:
        """Plain weights are read to their end and no further."""
        return 0

    @property
    def files(self) -> set[Path]:
        return {entry.file for parameter in self.parameters for source in parameter.sources for entry in source.entry_E}

    def file_of(self, expert: int) -> Path:
        return self.parameters[0].sources[0].entry_E[expert].file

    def offset_of(self, expert: int) -> int:
        return self.parameters[0].sources[0].place(expert)[1]

    def stored_bytes(self, expert: int) -> int:
        return self.expert_bytes

    def check(self, expert: int, slot: torch.Tensor) -> None:
        """Nothing that plain weights hold can do harm."""

    def can_multiply(self, *, is_transposed: bool) -> bool:
        return not is_transposed

    def kernel_matrices(self, views: Mapping[str, torch.Tensor], expert: int) -> dict[str, tuple[KernelMatrix, ...]]:
        if any(view.dtype != torch.bfloat16 or view.dim() != 2 for view in views.values()):
            return {}
        return {name: (plain_matrix(view),) for name, view in views.items()}

    def expand(self, views: Mapping[str, torch.Tensor], room: Mapping[str, torch.Tensor]) -> None:
        """Nothing to do: the views are the matrices."""

    def token_rate(self, hardware: Hardware, *, is_fast: bool) -> float:
        return hardware.token_rate(is_fast=is_fast)

    @property
    def is_straight(self) -> bool:
        """Whether every expert is read without conversion."""
        return all(parameter.runs is not None for parameter in self.parameters)

    @cached_property
    def regions(self) -> tuple[Region, ...]:
        sizes = [sum(parameter.nbytes for parameter in group) for group in self._groups]
        regions, start = [], 0
        for size in sizes:
            regions.append(Region(start, size))
            start += -(-size // BLOCK_BYTES) * BLOCK_BYTES + BLOCK_BYTES
        return tuple(regions)

    @cached_property
    def slot_bytes(self) -> int:
        """Bytes of a slot, a multiple of the block size."""
        last = self.regions[-1]
        return last.start + -(-last.nbytes // BLOCK_BYTES) * BLOCK_BYTES + BLOCK_BYTES

    @cached_property
    def is_shiftable(self) -> bool:
        """Whether O_DIRECT can fill a slot without a copy: one extent for each region, for every expert."""
        return self.is_straight and all(
            len(self.extents(expert)) == len(self.regions) for expert in range(self.layer.num_experts)
        )

    def extents(self, expert: int) -> list[Extent]:
        """What to read for one expert, neighbours in file and slot merged. Only for straight records."""
        extents: list[Extent] = []
        for region, (group, place) in enumerate(zip(self._groups, self.regions, strict=True)):
            base = place.start
            for parameter in group:
                for extent in _parameter_extents(parameter, expert, region, base):
                    if extents and _follows(extents[-1], extent):
                        last = extents[-1]
                        extents[-1] = Extent(last.entry, last.offset, last.nbytes + extent.nbytes, region, last.target)
                    else:
                        extents.append(extent)
                base += parameter.nbytes
        return extents

    def shifts(self, extents: Sequence[Extent]) -> tuple[int, ...]:
        """How far each region is shifted when its extent is read by whole blocks."""
        by_region: Mapping[int, Extent] = {extent.region: extent for extent in extents}
        return tuple(by_region[region].offset % BLOCK_BYTES for region in range(len(self.regions)))

    def views(self, slot: torch.Tensor, shifts: Sequence[int]) -> dict[str, torch.Tensor]:
        """The parameters of the expert in `slot` (uint8), whose regions are shifted by `shifts` bytes."""
        views = {}
        for group, region, shift in zip(self._groups, self.regions, shifts, strict=True):
            start = region.start + shift
            for parameter in group:
                raw = slot[start : start + parameter.nbytes]
                views[parameter.name] = raw.view(parameter.dtype).view(parameter.shape)
                start += parameter.nbytes
        return views

    def convert(self, expert: int, slot: torch.Tensor, model: Any, read: PartReader) -> None:
        """Run transformers' own conversion on the parts of one expert."""
        views = self.views(slot, (0,) * len(self.regions))
        for parameter in self.parameters:
            parts = [read(*source.place(expert), source.shape()) for source in parameter.sources]
            whole = convert_expert(model, parameter.full_name, parameter.sources, parameter.converter, parts)
            views[parameter.name].copy_(whole.reshape(parameter.shape))

    @classmethod
    def suits(cls, layer: ExpertLayer, views: Mapping[str, torch.Tensor]) -> bool:
        return True

    @classmethod
    def encode(cls, layer: ExpertLayer, views: Mapping[str, torch.Tensor]) -> list[bytes]:
        flat = [views[parameter.name].reshape(-1) for parameter in layer.parameters]
        return [tensor.view(torch.uint8).numpy().tobytes() for tensor in flat]

    @classmethod
    def record_bounds(cls, layer: ExpertLayer) -> tuple[int, int]:
        return layer.plain_bytes, layer.plain_bytes

    @classmethod
    def of_records(cls, layer: ExpertLayer, record_E: Sequence[TensorEntry]) -> "PlainForm":
        """The parameters lie one after the other in each record."""
        starts = accumulate((parameter.nbytes for parameter in layer.parameters), initial=0)
        packed = (_in_records(*pair, record_E) for pair in zip(layer.parameters, starts, strict=False))
        return cls(replace(layer, parameters=tuple(packed)))

    @cached_property
    def _groups(self) -> tuple[tuple[Parameter, ...], ...]:
        """Parameters of a region: neighbours in the file for every expert, as far as expert 0 tells."""
        if not self.is_straight:
            return tuple((parameter,) for parameter in self.parameters)
        groups: list[list[Parameter]] = []
        for parameter in self.parameters:
            if groups and self._adjacent(groups[-1][-1], parameter):
                groups[-1].append(parameter)
            else:
                groups.append([parameter])
        return tuple(tuple(group) for group in groups)

    def _adjacent(self, before: Parameter, after: Parameter) -> bool:
        for expert in range(self.layer.num_experts):
            first = _parameter_extents(before, expert, 0, 0)
            second = _parameter_extents(after, expert, 0, before.nbytes)
            if len(first) != 1 or len(second) != 1 or not _follows(first[0], second[0]):
                return False
        return True


def _in_records(parameter: Parameter, start: int, record_E: Sequence[TensorEntry]) -> Parameter:
    """The same parameter, found `start` bytes after the beginning of each record."""
    stored = DTYPE_NAMES[str(parameter.dtype).removeprefix("torch.")]
    entry_E = tuple(
        TensorEntry(
            f"{parameter.full_name}[{expert}]",
            record.file,
            record.offset + start,
            parameter.nbytes,
            stored,
            parameter.shape,
        )
        for expert, record in enumerate(record_E)
    )
    source = Source(parameter.full_name, entry_E, is_fused=False)
    return replace(parameter, sources=(source,), converter=None, runs=((0, 0, 0, prod(parameter.shape)),))


def _parameter_extents(parameter: Parameter, expert: int, region: int, base: int) -> list[Extent]:
    assert parameter.runs is not None
    item = parameter.dtype.itemsize
    extents: list[Extent] = []
    for source, inside, target, count in parameter.runs:
        entry, offset, _ = parameter.sources[source].place(expert)
        extent = Extent(entry, offset + inside * item, count * item, region, base + target * item)
        if extents and _follows(extents[-1], extent):
            last = extents[-1]
            extents[-1] = Extent(last.entry, last.offset, last.nbytes + extent.nbytes, region, last.target)
        else:
            extents.append(extent)
    return extents


def _follows(before: Extent, after: Extent) -> bool:
    return (
        before.region == after.region
        and before.offset + before.nbytes == after.offset
        and before.target + before.nbytes == after.target
        and before.entry.file == after.entry.file
    )


def _first_byte(parameter: Parameter) -> tuple[str, int]:
    entry, offset, _ = parameter.sources[0].place(0)
    return str(entry.file), offset
