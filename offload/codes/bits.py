"""Numbers of at most eight bits, one after the other in bytes, the first in the lowest bits."""

import torch


def unpack_bits(byte_RB: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """Numbers of fewer than eight bits, `[R, columns]` int32.

    Args:
        byte_RB: rows of bytes, which the numbers fill from the lowest bit on.
        bits: of a number.
        columns: numbers of a row.
    """
    wide_RB = torch.nn.functional.pad(byte_RB, (0, 1)).int()
    begin_C = bits * torch.arange(columns)
    low_RC = wide_RB[:, begin_C // 8] >> (begin_C % 8).int()
    high_RC = wide_RB[:, begin_C // 8 + 1] << (8 - begin_C % 8).int()
    return (low_RC | high_RC) & ((1 << bits) - 1)


def pack_bits(code_RC: torch.Tensor, bits: int, row_bytes: int) -> torch.Tensor:
    """Numbers of at most eight bits as rows of bytes.

    Args:
        code_RC: uint8.
        bits: of a number.
        row_bytes: of a row; what the numbers do not fill is zero.

    Returns:
        `[R, row_bytes]`, uint8.
    """
    rows, columns = code_RC.shape
    if 8 % bits == 0:
        return _joined(torch.nn.functional.pad(code_RC, (0, row_bytes * 8 // bits - columns)), bits)
    bit_RCb = (code_RC[..., None] >> torch.arange(bits, dtype=torch.uint8)) & 1
    flat_RX = torch.zeros(rows, 8 * row_bytes, dtype=torch.uint8)
    flat_RX[:, : columns * bits] = bit_RCb.reshape(rows, -1)
    return _joined(flat_RX, 1)


def _joined(code_RC: torch.Tensor, bits: int) -> torch.Tensor:
    """Numbers that fill whole bytes."""
    shift = torch.arange(0, 8, bits, dtype=torch.uint8)
    return (code_RC.reshape(len(code_RC), -1, 8 // bits) << shift).sum(-1, dtype=torch.uint8)
