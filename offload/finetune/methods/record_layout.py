"""What an expert's record holds when all parameters are trained, in bytes and as tensors."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...formats.form import Form
from ..storage.byte_moments import MEAN, SQUARE, num_blocks
from ..storage.overlay import matrices_in
from .adamw import AdamVector


@dataclass(frozen=True)
class RecordLayout:
    """The matrices as the model computes with them, if they are not float32; float32 copies; two moments.

    Args:
        form: how the layer's experts are stored.
        state_bits: of one number of a moment, 32 or 8.
    """

    form: Form
    state_bits: int = 32

    @property
    def num_elements(self) -> int:
        """Parameters of one expert."""
        return sum(parameter.nbytes // parameter.dtype.itemsize for parameter in self.form.layer.parameters)

    @property
    def nbytes(self) -> int:
        """Of one record."""
        return self._copy_bytes + 4 * self.num_elements + sum(self._moment_sizes)

    @property
    def _copy_bytes(self) -> int:
        """Of matrices in another dtype than the float32 numbers that are stepped."""
        has_copy = any(parameter.dtype != torch.float32 for parameter in self.form.layer.parameters)
        return self.form.layer.plain_bytes if has_copy else 0

    @property
    def _moment_sizes(self) -> tuple[int, ...]:
        """Bytes of each part of the moments; scales come before codes, so that all of them are aligned."""
        count = self.num_elements
        return (4 * count, 4 * count) if self.state_bits == 32 else (4 * num_blocks(count),) * 2 + (count, count)

    def begin(self, matrices: Sequence[torch.Tensor], data: torch.Tensor) -> AdamVector:
        """Parameters that no step has changed, in a record's bytes.

        Args:
            matrices: in the order in which a record has them.
            data: the record's room.
        """
        vector = self.vector(data[: self.nbytes].zero_())
        for matrix, part in zip(matrices, self.split(vector.value), strict=True):
            part.copy_(matrix)
        return vector

    def split(self, value: torch.Tensor) -> list[torch.Tensor]:
        """Flat numbers as the matrices of the model, in the order in which a record has them."""
        parameters = self.form.parameters
        parts = value.split([parameter.nbytes // parameter.dtype.itemsize for parameter in parameters])
        return [part.view(parameter.shape) for part, parameter in zip(parts, parameters, strict=True)]

    def store(self, vector: AdamVector, data: torch.Tensor) -> None:
        """Bring a record's bytes up to date after a vector from `vector` has changed."""
        if self._copy_bytes:
            for matrix, part in zip(matrices_in(data, self.form.parameters), self.split(vector.value), strict=True):
                matrix.copy_(part)
        if self.state_bits == 8:
            moments = zip((MEAN, SQUARE), (vector.mean, vector.square), strict=True)
            (mean, mean_scale), (square, square_scale) = (coder.encode(moment) for coder, moment in moments)
            for place, part in zip(self._moments(data), (mean_scale, square_scale, mean, square), strict=True):
                place.copy_(part.view(torch.uint8))

    def _moments(self, data: torch.Tensor) -> list[torch.Tensor]:
        sizes = self._moment_sizes
        return list(data[self.nbytes - sum(sizes) : self.nbytes].split(sizes))

    def vector(self, data: torch.Tensor) -> AdamVector:
        """Weights and moments of a record's bytes, in their place where they are stored as float32."""
        value = data[self._copy_bytes :][: 4 * self.num_elements].view(torch.float32)
        moments = self._moments(data)
        if self.state_bits == 32:
            mean, square = (part.view(torch.float32) for part in moments)
            return AdamVector(value, mean, square)
        mean_scale, square_scale, mean, square = moments
        return AdamVector(
            value,
            MEAN.decode(mean, mean_scale.view(torch.float32)),
            SQUARE.decode(square, square_scale.view(torch.float32)),
        )
