"""The contract of a stored form: what everything above this folder may ask of the way in which experts are stored.

A form belongs to one layer. It says where each expert's bytes are, how they lie in a slot, and how they become the
matrices that the model computes with. Nothing above this folder asks which form it has.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch

from routing.ground.hardware import Hardware

from ..checkpoint.experts import ExpertLayer
from ..checkpoint.tensors import TensorEntry
from ..native.kernel_matrix import KernelMatrix

BLOCK_BYTES = 4096
"""What O_DIRECT reads in: offsets, lengths and memory are multiples of it on every file system that was tried."""

PartReader = Callable[[TensorEntry, int, int, tuple[int, ...]], torch.Tensor]
"""(entry, offset in its file, bytes, shape) -> that part of the tensor, in memory of its own."""


@dataclass(frozen=True)
class Extent:
    """`nbytes` bytes at `offset` of a file that fill a slot from byte `target` on (before any shift)."""

    entry: TensorEntry
    offset: int
    nbytes: int
    region: int
    target: int


@dataclass(frozen=True)
class Region:
    """A stretch of a slot that one read may fill, with room to be shifted by less than a block."""

    start: int
    nbytes: int


class MatrixForm(Protocol):
    """One resident matrix in a stored form: what linear layers are held in."""

    @property
    def name(self) -> str:
        """Of the stored form, for messages."""
        ...

    def expand(self, stored: torch.Tensor, out_FD: torch.Tensor) -> None:
        """Write the matrix as the model computes with it."""
        ...

    def kernel_matrix(self, stored: torch.Tensor, shape: tuple[int, int]) -> KernelMatrix | None:
        """The stored bytes as our C multiplies them; None if they are expanded for every product."""
        ...


class MatrixEncoder(MatrixForm, Protocol):
    """A stored form that plain matrices are put in when they are loaded."""

    def accepts(self, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
        """Whether a matrix of this shape and dtype can be stored so."""
        ...

    def expected_bytes(self, shape: tuple[int, int]) -> int:
        """Stored bytes of a matrix that has not been read yet, if its weights are distributed normally."""
        ...

    def encode(self, weight_FD: torch.Tensor) -> torch.Tensor | None:
        """The stored bytes (uint8), ready to multiply with; None if they would save nothing."""
        ...


class Form(Protocol):
    """How the experts of one layer are stored."""

    name: ClassVar[str]
    """Its key in FORMS, and what the index of a packed copy calls it."""
    linears: ClassVar[MatrixEncoder | None]
    """How the model's linear layers are held beside experts of this form; None leaves them as they are."""
    reaches_gpu: ClassVar[bool]
    """Whether the GPU tier computes with the stored bytes."""
    is_expanded: ClassVar[bool]
    """Whether `views` are not yet the matrices, so that computing needs `expand` and room for one expert."""

    @property
    def layer(self) -> ExpertLayer:
        """Shapes and dtypes of the matrices that the model computes with."""
        ...

    @property
    def expert_bytes(self) -> int:
        """Stored bytes of one expert; the mean, rounded up, if experts differ."""
        ...

    @property
    def slot_bytes(self) -> int:
        """Bytes of a slot that holds any expert of the layer, a multiple of BLOCK_BYTES."""
        ...

    @property
    def own_slot_bytes(self) -> tuple[int, ...]:
        """Bytes of a slot for each expert alone, multiples of BLOCK_BYTES: what all experts in memory take."""
        ...

    @property
    def guard_bytes(self) -> int:
        """Bytes after the last slot that reading a slot may touch."""
        ...

    @property
    def regions(self) -> tuple[Region, ...]:
        """The stretches of a slot."""
        ...

    @property
    def files(self) -> set[Path]:
        """Every file that holds some of these experts."""
        ...

    @property
    def is_straight(self) -> bool:
        """Whether `extents` fill a slot; otherwise `convert` does."""
        ...

    @property
    def is_shiftable(self) -> bool:
        """Whether O_DIRECT can fill a slot without a copy: one extent for each region, for every expert."""
        ...

    def file_of(self, expert: int) -> Path:
        """The file of an expert's first byte."""
        ...

    def offset_of(self, expert: int) -> int:
        """Where an expert's first byte is in that file."""
        ...

    def stored_bytes(self, expert: int) -> int:
        """Stored bytes of this expert."""
        ...

    def extents(self, expert: int) -> list[Extent]:
        """What to read for one expert, neighbours in file and slot merged."""
        ...

    def shifts(self, extents: Sequence[Extent]) -> tuple[int, ...]:
        """How far each region is shifted when its extent is read by whole blocks."""
        ...

    def convert(self, expert: int, slot: torch.Tensor, model: Any, read: PartReader) -> None:
        """Fill a slot where no extents do; only called if not `is_straight`."""
        ...

    def views(self, slot: torch.Tensor, shifts: Sequence[int]) -> dict[str, torch.Tensor]:
        """The stored matrices of the expert in `slot` (uint8), by parameter name."""
        ...

    def can_multiply(self, *, is_transposed: bool) -> bool:
        """Whether our C multiplies single tokens with the stored bytes, row by row; `expand` comes first otherwise.

        Args:
            is_transposed: whether the model's parameters have inputs as rows and outputs as columns.
        """
        ...

    def kernel_matrices(self, views: Mapping[str, torch.Tensor], expert: int) -> dict[str, tuple[KernelMatrix, ...]]:
        """Each parameter as our C multiplies it, in pieces from the first row to the last; empty if it does not.

        Args:
            views: of `views`, whose memory may still be written.
            expert: whose they are.
        """
        ...

    def check(self, expert: int, slot: torch.Tensor) -> None:
        """Refuse stored bytes that would make `expand` or a kernel read outside the slot.

        Raises:
            OSError: if they would.
        """
        ...

    def expand(self, views: Mapping[str, torch.Tensor], room: Mapping[str, torch.Tensor]) -> None:
        """Write an expert's matrices as the model computes with them; only called if `is_expanded`.

        Args:
            views: of `views`.
            room: a matrix for each parameter, of its shape and dtype.
        """
        ...

    def token_rate(self, hardware: Hardware, *, is_fast: bool) -> float:
        """Stored bytes per second that the products of one token read.

        Args:
            hardware: rates of this machine.
            is_fast: whether products may differ from torch's in the last bits.
        """
        ...

    @classmethod
    def suits(cls, layer: ExpertLayer, views: Mapping[str, torch.Tensor]) -> bool:
        """Whether a layer should be packed in this form.

        Args:
            layer: shapes and dtypes of its matrices.
            views: the matrices of its first expert.
        """
        ...

    @classmethod
    def encode(cls, layer: ExpertLayer, views: Mapping[str, torch.Tensor]) -> list[bytes]:
        """The parts of one expert's record in a packed copy, to be joined."""
        ...

    @classmethod
    def record_bounds(cls, layer: ExpertLayer) -> tuple[int, int]:
        """The fewest and the most bytes that a record of this layer can have.

        Raises:
            ValueError: if the layer cannot be stored in this form.
        """
        ...

    @classmethod
    def of_records(cls, layer: ExpertLayer, record_E: Sequence[TensorEntry]) -> "Form":
        """The form of a layer of a packed copy.

        Args:
            layer: shapes of its matrices.
            record_E: where each expert's record is.
        """
        ...
