"""Linear layers of a GGUF file as matrices in memory: the blocks of the file."""

from dataclasses import dataclass

import torch

from ...checkpoint.gguf.model import GgufModel
from ...checkpoint.gguf.tensors import row_order
from ...checkpoint.tensors import TensorEntry, read_bytes
from ...native.kernel_matrix import GGUF, KernelMatrix
from ..resident.linears import StoredLinear
from .expand import expand_rows, has_expander, kernel_parameter


@dataclass(frozen=True)
class BlockMatrix:
    """A matrix as the blocks of a type of ggml."""

    name: str

    def expand(self, stored: torch.Tensor, out_FD: torch.Tensor) -> None:
        expand_rows(self.name, stored, out_FD)

    def kernel_matrix(self, stored: torch.Tensor, shape: tuple[int, int]) -> KernelMatrix | None:
        return KernelMatrix(GGUF, *shape, kernel_parameter(self.name), stored.data_ptr())


def block_linear(name: str, opened: GgufModel) -> StoredLinear | None:
    """A parameter that is one matrix of blocks, whose rows at most are moved; None if it is something else."""
    entries = opened.names.dense.get(name, ())
    if len(entries) != 1 or not has_expander(entries[0].dtype):
        return None
    (entry,) = entries
    if (order := row_order(entry, opened.change)) is None:
        return None
    return StoredLinear(BlockMatrix(entry.dtype), entry.shape, entry.nbytes, lambda: _rows(entry, order))


def _rows(entry: TensorEntry, order: torch.Tensor) -> torch.Tensor:
    """The stored rows in the model's order."""
    stored_FB = read_bytes(entry.file, entry.offset, entry.nbytes).view(entry.shape[0], -1)
    return (stored_FB[order] if len(order) else stored_FB).reshape(-1)
