"""Companions whose values say how a matrix lies: they are read when the checkpoint is opened."""

import json
import struct

import torch

from ...codes.decode import NF4
from ..tensors import TensorEntry, read_tensor

MAX_DIMENSIONS = 3
MAX_STATE_BYTES = 4096
PRODUCTS = {"bfloat16": "F32", "float32": "F32", "float16": "F16"}
"""To what bitsandbytes rounds products of float32, by the dtype it names, before the model's dtype."""


def shape_in(entry: TensorEntry) -> tuple[int, ...]:
    """A plain tensor's shape, which a companion holds.

    Raises:
        ValueError: if it holds something else.
    """
    if entry.dtype not in ("I64", "I32") or len(entry.shape) != 1 or not 2 <= entry.shape[0] <= MAX_DIMENSIONS:
        raise ValueError(f"{entry.name} {entry.dtype} {list(entry.shape)}: expected a shape of 2 or 3 integers")
    # without torch: Kimi-K2 has 69,000 of these
    with entry.file.open("rb", buffering=0) as stream:
        stream.seek(entry.offset)
        shape = struct.unpack(f"<{entry.shape[0]}{'q' if entry.dtype == 'I64' else 'i'}", stream.read(entry.nbytes))
    if min(shape) < 1:
        raise ValueError(f"{entry.name}: holds {list(shape)}, which is no shape")
    return shape


def expect_usual_order(entry: TensorEntry, group: int) -> None:
    """Refuse columns that are not in the order of their groups.

    Raises:
        ValueError: if they are not.
    """
    index = read_tensor(entry)
    usual = torch.arange(index.shape[-1]) // group
    if not (torch.equal(index.long(), usual.expand(index.shape)) or bool((index == -1).all())):
        raise ValueError(
            f"{entry.name}: columns are sorted by activation, so groups are not neighbours; "
            "quantise again without actorder, or use a plain checkpoint"
        )


def expect_quantiles(entry: TensorEntry) -> None:
    """Refuse a table of sixteen numbers that is not nf4's.

    Raises:
        ValueError: if it is another.
    """
    if entry.dtype != "F32" or entry.shape != (16,) or not torch.equal(read_tensor(entry), torch.tensor(NF4)):
        raise ValueError(f"{entry.name} {entry.dtype} {list(entry.shape)}: not the sixteen numbers of nf4")


def nf4_state(entry: TensorEntry) -> tuple[int, int, int, str]:
    """Rows, columns, columns of a group, and the dtype of products, of the JSON that bitsandbytes stores as bytes.

    Raises:
        ValueError: if it says something else.
    """
    if entry.dtype != "U8" or entry.nbytes > MAX_STATE_BYTES:
        raise ValueError(f"{entry.name} {entry.dtype} {list(entry.shape)}: expected a short text in bytes")
    try:
        state = json.loads(bytes(read_tensor(entry).tolist()))
        (rows, columns), size, dtype = state["shape"], state["blocksize"], PRODUCTS[state["dtype"]]
        if state["quant_type"] != "nf4" or min(rows, columns, size) < 1:
            raise ValueError("not nf4, or of no size")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{entry.name}: not the state of an nf4 matrix ({error})") from error
    return int(rows), int(columns), int(size), dtype
