"""What an expert's record holds when all parameters are trained, in bytes and as tensors."""

from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch

from ...formats.form import Form
from ..storage.byte_moments import MEAN, SQUARE, num_blocks
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

    def matrices(self, value: torch.Tensor) -> dict[str, torch.Tensor]:
        """Flat float32 weights as the matrices of the model, in the order in which a record has them."""
        sizes = [parameter.nbytes // parameter.dtype.itemsize for parameter in self.form.parameters]
        return {
            parameter.name: part.to(parameter.dtype).view(parameter.shape)
            for parameter, part in zip(self.form.parameters, value.split(sizes), strict=True)
        }

    def parts(self, vector: AdamVector) -> list[torch.Tensor]:
        """The tensors of a record, one after the other its bytes."""
        copies = list(self.matrices(vector.value).values()) if self._copy_bytes else []
        if self.state_bits == 32:
            return [*copies, vector.value, vector.mean, vector.square]
        (mean, mean_scale), (square, square_scale) = MEAN.encode(vector.mean), SQUARE.encode(vector.square)
        return [*copies, vector.value, mean_scale, square_scale, mean, square]

    def vector(self, data: torch.Tensor) -> AdamVector:
        """Weights and moments of a record's bytes, in their place where they are stored as float32."""
        sizes = (self._copy_bytes, 4 * self.num_elements, *self._moment_sizes)
        starts = accumulate(sizes, initial=0)
        _, value, *moments = (data[start:stop] for start, stop in pairwise(starts))
        numbers = value.view(torch.float32)
        if self.state_bits == 32:
            mean, square = (part.view(torch.float32) for part in moments)
            return AdamVector(numbers, mean, square)
        mean_scale, square_scale, mean, square = moments
        return AdamVector(
            numbers,
            MEAN.decode(mean, mean_scale.view(torch.float32)),
            SQUARE.decode(square, square_scale.view(torch.float32)),
        )
