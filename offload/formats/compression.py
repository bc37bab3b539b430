"""Weights of bfloat16 in 11 bits and a fraction, without loss: exponents as codes of 3 bits.

Half of the bits of a trained (or random) weight say which power of two it is near, and nearly all weights of a matrix
are near the same few: the exponents have an entropy of 2.6 bits. Sign and fraction, 8 bits, stay as they are. The
exponent becomes one of seven codes, or an eighth that says "another", and those stand elsewhere, a byte each.

A matrix is cut in blocks of 32 rows, each with its own codes:

    heads      16 bytes a block: the seven exponents, 255, where its other exponents begin (u32), 4 bytes of zero
    segments   32 rows x 64 columns each: signs and fractions (2048 bytes), then codes (24 bytes a row)
    others     the exponents without a code, in the order of the segments

Heads, and the segments of all blocks, fill whole multiples of 64 bytes. Within a row of a segment, eight weights of the
first half alternate with eight of the second, for the instructions that interleave bytes (see `compressed.h`).

Source: that exponents of bfloat16 weights carry 2.6 bits is DFloat11's observation (arXiv:2504.11651); it uses Huffman
codes, of 11 bits a weight on average.
"""

import functools
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from ..native.kernel_matrix import COMPRESSED, KernelMatrix
from ..native.library import NUMBER, POINTER, c_function

# the format, as drawn above: other numbers are another format, and the C code has the same ones
BLOCK_ROWS, SEGMENT_COLUMNS, GROUP = 32, 64, 8
HEAD_BYTES, HEAD_ALIGNMENT = 16, 64
SEGMENT_BYTES = BLOCK_ROWS * SEGMENT_COLUMNS * 11 // 8
NUM_CODES, ANOTHER, UNKNOWN = 7, 7, 255
GUARD_BYTES = 64
"""What reading a matrix may touch after its end; a whole block of other exponents more if the heads were forged."""


@dataclass(frozen=True)
class CompressedShape:
    """Where the parts of a compressed matrix of `rows` x `columns` begin, in bytes."""

    rows: int
    columns: int

    @property
    def num_blocks(self) -> int:
        return self.rows // BLOCK_ROWS

    @property
    def segments_at(self) -> int:
        return -(-self.num_blocks * HEAD_BYTES // HEAD_ALIGNMENT) * HEAD_ALIGNMENT

    @property
    def others_at(self) -> int:
        """The size of everything but the exponents without a code."""
        return self.segments_at + self.num_blocks * (self.columns // SEGMENT_COLUMNS) * SEGMENT_BYTES


def can_compress(shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Whether a matrix is of a kind that can be compressed: bfloat16, whole blocks and segments."""
    return (
        dtype == torch.bfloat16
        and len(shape) == 2
        and shape[0] % BLOCK_ROWS == 0
        and shape[1] % SEGMENT_COLUMNS == 0
        and prod(shape) > 0
    )


def compress(weight_RC: torch.Tensor, others_at: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Compress one matrix.

    Args:
        weight_RC: bfloat16, contiguous; `can_compress` its shape.
        others_at: where the exponents without a code will stand, in bytes from the beginning of the heads; right after
            the segments if not given.

    Returns:
        Heads and segments (uint8, `CompressedShape.others_at` bytes), and the exponents without a code (uint8).
    """
    shape, by_c = CompressedShape(*weight_RC.shape), _compress()
    others_at = shape.others_at if others_at is None else others_at
    if by_c is None:
        return _compress_plainly(weight_RC, shape, others_at)
    whole, others = torch.zeros(shape.others_at, dtype=torch.uint8), torch.empty(weight_RC.numel(), dtype=torch.uint8)
    count = by_c(weight_RC.data_ptr(), shape.rows, shape.columns, others_at, whole.data_ptr(), others.data_ptr())
    return whole, others[:count]


def expand(compressed: torch.Tensor, out_RC: torch.Tensor) -> None:
    """Write a compressed matrix as it was.

    Args:
        compressed: uint8, contiguous, from the first head to beyond the last exponent without a code.
        out_RC: bfloat16, contiguous; its shape is the matrix's.
    """
    by_c = _expand()
    if by_c is None:
        _expand_plainly(compressed, out_RC)
    else:
        by_c(compressed.data_ptr(), *out_RC.shape, out_RC.data_ptr())


@functools.cache
def _compress() -> Any:
    """`expertier_compress`; None without a C compiler, as the other."""
    return c_function("expertier_compress", POINTER, NUMBER, NUMBER, NUMBER, POINTER, POINTER, result=NUMBER)


@functools.cache
def _expand() -> Any:
    return c_function("expertier_expand", POINTER, NUMBER, NUMBER, POINTER)


class CompressedMatrix:
    """One resident matrix, compressed."""

    name = "compressed"
    NORMAL_OTHERS = 0.025
    """Share of normally distributed weights whose exponent has no code: 0.021 to 0.030, depending on their scale."""

    def accepts(self, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
        return can_compress(shape, dtype)

    def expected_bytes(self, shape: tuple[int, int]) -> int:
        return CompressedShape(*shape).others_at + int(self.NORMAL_OTHERS * prod(shape)) + GUARD_BYTES

    def encode(self, weight_FD: torch.Tensor) -> torch.Tensor | None:
        whole, others = compress(weight_FD)
        stored = torch.cat([whole, others, torch.zeros(GUARD_BYTES, dtype=torch.uint8)])
        return stored if stored.nbytes <= weight_FD.nbytes - GUARD_BYTES else None

    def expand(self, stored: torch.Tensor, out_FD: torch.Tensor) -> None:
        expand(stored, out_FD)

    def kernel_matrix(self, stored: torch.Tensor, shape: tuple[int, int]) -> KernelMatrix | None:
        return KernelMatrix(COMPRESSED, *shape, None, stored.data_ptr())


def others_end(compressed: torch.Tensor, shape: CompressedShape) -> int:
    """Where the last block's exponents without a code begin at most, as the heads say: what a reader has to check."""
    head_B = compressed[: shape.num_blocks * HEAD_BYTES].view(shape.num_blocks, HEAD_BYTES)
    return int(head_B[:, 8:12].contiguous().view(torch.int32).long().bitwise_and(0xFFFFFFFF).max())


def _compress_plainly(
    weight_RC: torch.Tensor, shape: CompressedShape, others_at: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `expertier_compress` does, by torch."""
    rest, exponent = _split(_in_segments(weight_RC.view(torch.int16)))
    exponent_BN = exponent.reshape(shape.num_blocks, -1)
    chosen_BK = _most_frequent(exponent_BN)
    code_BN = _codes(exponent_BN, chosen_BK)
    is_other_BN = code_BN == ANOTHER
    whole = torch.zeros(shape.others_at, dtype=torch.uint8)
    begin_B = is_other_BN.sum(1).cumsum(0).roll(1)
    begin_B[:1] = 0
    head_B = whole[: shape.num_blocks * HEAD_BYTES].view(shape.num_blocks, HEAD_BYTES)
    head_B[:, :NUM_CODES], head_B[:, NUM_CODES] = chosen_BK, UNKNOWN
    head_B[:, 8:12] = (begin_B + others_at).int()[:, None].view(torch.uint8)
    segments = whole[shape.segments_at :].view(-1, SEGMENT_BYTES)
    segments[:, : BLOCK_ROWS * SEGMENT_COLUMNS] = rest.reshape(len(segments), -1)
    segments[:, BLOCK_ROWS * SEGMENT_COLUMNS :] = _pack_codes(code_BN).view(len(segments), -1)
    return whole, exponent_BN[is_other_BN]


def _expand_plainly(compressed: torch.Tensor, out_RC: torch.Tensor) -> None:
    """What `expertier_expand` does, by torch."""
    shape = CompressedShape(*out_RC.shape)
    head_B = compressed[: shape.num_blocks * HEAD_BYTES].view(shape.num_blocks, HEAD_BYTES)
    segments = compressed[shape.segments_at : shape.others_at].view(-1, SEGMENT_BYTES)
    rest = segments[:, : BLOCK_ROWS * SEGMENT_COLUMNS].reshape(shape.num_blocks, -1).short()
    code_BN = _unpack_codes(segments[:, BLOCK_ROWS * SEGMENT_COLUMNS :]).view(shape.num_blocks, -1)
    exponent_BN = head_B[:, :8].gather(1, code_BN.long())
    begin_B = head_B[:, 8:12].contiguous().view(torch.int32).view(-1).long()
    for block, is_other_N in enumerate(code_BN == ANOTHER):
        begin = int(begin_B[block])
        exponent_BN[block, is_other_N] = compressed[begin : begin + int(is_other_N.sum())]
    bits = (rest & 0x80) << 8 | exponent_BN.short() << 7 | rest & 0x7F
    out_RC.view(torch.int16).copy_(_out_of_segments(bits, shape))


def _in_segments(bits_RC: torch.Tensor) -> torch.Tensor:
    """`[blocks, segments, 32, 64]`, the weights of a row in the order in which they are stored."""
    rows, columns = bits_RC.shape
    cut = bits_RC.view(rows // BLOCK_ROWS, BLOCK_ROWS, columns // SEGMENT_COLUMNS, 2, 4, GROUP)
    return cut.permute(0, 2, 1, 4, 3, 5).reshape(rows // BLOCK_ROWS, columns // SEGMENT_COLUMNS, BLOCK_ROWS, -1)


def _out_of_segments(bits: torch.Tensor, shape: CompressedShape) -> torch.Tensor:
    cut = bits.view(shape.num_blocks, shape.columns // SEGMENT_COLUMNS, BLOCK_ROWS, 4, 2, GROUP)
    return cut.permute(0, 2, 1, 4, 3, 5).reshape(shape.rows, shape.columns)


def _split(bits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sign and fraction, and exponent, of bfloat16 numbers: a byte each."""
    rest = (bits >> 8) & 0x80 | bits & 0x7F
    return rest.to(torch.uint8), ((bits >> 7) & 0xFF).to(torch.uint8)


def _most_frequent(exponent_BN: torch.Tensor) -> torch.Tensor:
    """The seven exponents that each block has most of; 255 (infinities, NaN) never gets a code."""
    num_blocks = len(exponent_BN)
    place = exponent_BN + (torch.arange(num_blocks, dtype=torch.int32) << 8)[:, None]
    count_BX = torch.bincount(place.view(-1), minlength=num_blocks << 8).view(num_blocks, 256)
    return count_BX[:, :UNKNOWN].topk(NUM_CODES).indices.to(torch.uint8)


def _codes(exponent_BN: torch.Tensor, chosen_BK: torch.Tensor) -> torch.Tensor:
    code_BN = torch.full_like(exponent_BN, ANOTHER)
    for code in range(NUM_CODES):
        code_BN.masked_fill_(exponent_BN == chosen_BK[:, code : code + 1], code)
    return code_BN


def _pack_codes(code_BN: torch.Tensor) -> torch.Tensor:
    """Eight codes of 3 bits in 3 bytes, the first in the lowest bits."""
    code_GJ = code_BN.view(-1, GROUP).int()
    packed_G = code_GJ[:, 0].clone()
    for place in range(1, GROUP):
        packed_G |= code_GJ[:, place] << 3 * place
    return packed_G.view(torch.uint8).view(-1, 4)[:, :3].contiguous()


def _unpack_codes(packed: torch.Tensor) -> torch.Tensor:
    byte_GI = packed.reshape(-1, 3).int()
    packed_G = byte_GI[:, 0] | byte_GI[:, 1] << 8 | byte_GI[:, 2] << 16
    return torch.stack([packed_G >> 3 * place & 7 for place in range(GROUP)], dim=1)
