"""Companions whose values say how a matrix lies: they are read when the checkpoint is opened."""

import errno
import json
import os
import struct
from dataclasses import dataclass

import torch

from ...codes.decode import NF4
from ..tensors import TensorEntry, read_tensor

MAX_DIMENSIONS = 3
"""Of a quantised tensor: experts, rows, columns."""
PAGE_BYTES = 4096
"""What files have holes of."""
MAX_STATE_BYTES = 4096
"""Of a text in a tensor. The JSON in which bitsandbytes says how a matrix was quantised takes some 200."""
PRODUCTS = {"bfloat16": "F32", "float32": "F32", "float16": "F16"}
"""To what bitsandbytes rounds products of float32, by the dtype it names, before the model's dtype."""


def shape_in(entry: TensorEntry) -> tuple[int, ...] | None:
    """A plain tensor's shape, which a companion holds; None if only the head of its file is here.

    Raises:
        ValueError: if it holds something else.
    """
    if entry.dtype not in ("I64", "I32") or len(entry.shape) != 1 or not 2 <= entry.shape[0] <= MAX_DIMENSIONS:
        raise ValueError(f"{entry.name} {entry.dtype} {list(entry.shape)}: expected a shape of 2 or 3 integers")
    shape = struct.unpack(f"<{entry.shape[0]}{'q' if entry.dtype == 'I64' else 'i'}", _bytes_of(entry))
    if not any(shape) and _is_absent(entry):
        return None
    if min(shape) < 1:
        raise ValueError(f"{entry.name}: holds {list(shape)}, which is no shape")
    return shape


def is_usual_order(entry: TensorEntry, group: int) -> bool:
    """Whether an index of the groups of columns says that they are neighbours, or says nothing (-1)."""
    index = read_tensor(entry)
    usual = torch.arange(index.shape[-1]) // group
    return torch.equal(index.long(), usual.expand(index.shape)) or bool((index == -1).all())


def integer_in(entry: TensorEntry) -> int:
    """The one number that a companion holds.

    Raises:
        ValueError: if it holds something else.
    """
    kind = {"I64": "<q", "I32": "<i", "U8": "<B"}.get(entry.dtype)
    if kind is None or entry.shape not in ((), (1,)):
        raise ValueError(f"{entry.name} {entry.dtype} {list(entry.shape)}: expected one integer")
    return int(struct.unpack(kind, _bytes_of(entry))[0])


def text_in(entry: TensorEntry) -> str:
    """The text that a companion holds, a letter a byte.

    Raises:
        ValueError: if it holds something else.
    """
    if entry.dtype != "U8" or entry.nbytes > MAX_STATE_BYTES:
        raise ValueError(f"{entry.name} {entry.dtype} {list(entry.shape)}: expected a short text in bytes")
    data = _bytes_of(entry)
    if not any(data) and _is_absent(entry):
        raise ValueError(
            f"{entry.name}: says how a matrix lies, and only the head of its file is here; download the model first"
        )
    return data.decode("latin-1")


def expect_quantiles(entry: TensorEntry) -> None:
    """Refuse a table of sixteen numbers that is not nf4's.

    Raises:
        ValueError: if it is another.
    """
    if entry.dtype != "F32" or entry.shape != (16,) or not torch.equal(read_tensor(entry), torch.tensor(NF4)):
        raise ValueError(f"{entry.name} {entry.dtype} {list(entry.shape)}: not the sixteen numbers of nf4")


@dataclass(frozen=True, kw_only=True)
class Nf4State:
    """What bitsandbytes says of an nf4 matrix; `block_groups` is 0 if its scales are plain."""

    shape: tuple[int, int]
    group_columns: int
    product: str
    block_groups: int
    offset: float


def nf4_state(entry: TensorEntry) -> Nf4State:
    """The JSON that bitsandbytes stores as bytes.

    Raises:
        ValueError: if it says something else.
    """
    text = text_in(entry)
    try:
        state = json.loads(text)
        rows, columns = (int(length) for length in state["shape"])
        found = Nf4State(
            shape=(rows, columns),
            group_columns=int(state["blocksize"]),
            product=PRODUCTS[state["dtype"]],
            block_groups=int(state.get("nested_blocksize", 0)),
            offset=float(state.get("nested_offset", 0.0)),
        )
        if state["quant_type"] != "nf4" or min(rows, columns, found.group_columns) < 1 or found.block_groups < 0:
            raise ValueError("not nf4, or of no size")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{entry.name}: not the state of an nf4 matrix ({error})") from error
    return found


def _is_absent(entry: TensorEntry) -> bool:
    """Whether nothing is stored from the next page of the file on: of a model on the hub that is only looked at, heads
    are here, and holes for the rest."""
    with entry.file.open("rb", buffering=0) as stream:
        try:
            os.lseek(stream.fileno(), -(-entry.offset // PAGE_BYTES) * PAGE_BYTES, os.SEEK_DATA)
        except OSError as error:
            return error.errno == errno.ENXIO
    return False


def _bytes_of(entry: TensorEntry) -> bytes:
    """All bytes of a small tensor, without torch: Kimi-K2 has 69,000 of them."""
    with entry.file.open("rb", buffering=0) as stream:
        stream.seek(entry.offset)
        return stream.read(entry.nbytes)
