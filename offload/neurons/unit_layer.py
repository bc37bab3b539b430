"""What a bundle needs to know of one module whose hidden units come one by one, and what such a module must be like.

A unit is a row of the matrices before the activation and a column of the one after it. It is active where its gate's
product is positive. What a unit gives where it is not active must be zero, so that nothing has to be read of it.

Shapes: F hidden units of one feed-forward or of one expert, D model width.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from xxhash import xxh3_64_hexdigest

ROUND = 64
"""Rows of a product are a multiple of it: oneDNN compiles one for every number of rows, which takes as long as some
products of one token."""
TRIED = (-1e-6, -0.5, -3.0, -1e4)
"""Inputs at which an activation has to be zero."""


@dataclass(frozen=True, eq=False, kw_only=True)
class UnitLayer(ABC):
    """A feed-forward, or all experts of a layer one after the other.

    Args:
        name: of the module that computes them.
        parts: names of its matrices: the gate first, the one after the activation last.
        num_units: of the feed-forward, or of all experts together.
        rows_at_once: of units, and of zeros that make them a round number, that a call has in memory at most.
        width: D, numbers of a row.
        dtype: of the running model.
    """

    name: str
    parts: tuple[str, ...]
    num_units: int
    rows_at_once: int
    width: int
    dtype: torch.dtype

    @property
    def unit_bytes(self) -> int:
        """Of one unit."""
        return len(self.parts) * self.width * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Of all units."""
        return self.num_units * self.unit_bytes

    @property
    @abstractmethod
    def weight_names(self) -> frozenset[str]:
        """Full names of the parameters that its units are."""

    @abstractmethod
    def stamps(self) -> tuple[str, ...]:
        """Of its tensors in the checkpoint: another checkpoint of the same shapes has others."""

    @abstractmethod
    def matrices(self) -> Iterator[tuple[torch.Tensor, ...]]:
        """Of each feed-forward in it: its gate [F, D], more rows [F, D] if there are, and columns [D, F]."""


def rounded(count: int) -> int:
    """The rows of a product with so many units."""
    return -(-count // ROUND) * ROUND


def stored_bytes(file: Path, offset: int, nbytes: int, name: str) -> bytearray:
    """A stretch of a checkpoint's file.

    Raises:
        OSError: if the file ends before.
    """
    with file.open("rb") as opened:
        opened.seek(offset)
        data = bytearray(opened.read(nbytes))
    if len(data) != nbytes:
        raise OSError(f"{file} ends within {name}")
    return data


def stamp(*pieces: bytes | bytearray) -> str:
    """A name for these bytes."""
    return str(xxh3_64_hexdigest(b"".join(pieces)))


def is_zero_below_zero(activation: Callable[[torch.Tensor], torch.Tensor]) -> bool:
    """Whether an activation gives zero for everything that is not positive: ReLU and its square."""
    with torch.no_grad():
        return not activation(torch.tensor([0.0, *TRIED])).any()


def expect_zero_below_zero(
    name: str, activation: Callable[[torch.Tensor], torch.Tensor] | None, kind: str = "unknown"
) -> None:
    """Refuse a module that needs every unit of every token.

    Args:
        name: of the module, for the message.
        activation: gives what the units are, of the gate's products.
        kind: of the activation, for the message.

    Raises:
        ValueError: if the activation is not known, or not zero below zero.
    """
    if activation is None or not is_zero_below_zero(activation):
        raise ValueError(
            f"{name}: its activation ({kind}) is not zero where the gate is negative, so every unit of every token is "
            "needed; `expertier trace neurons` says how sparse a model is"
        )
