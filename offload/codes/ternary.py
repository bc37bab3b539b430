"""Ternary weights in a code of variable length: a word of 16 bits names one of the most probable runs of weights.

A weight is 0, or the row's number below zero, or that above. Nearly all are 0, so that the most probable runs are long.
A row is a whole number of words; the longest run that fits is taken each time.

Source: QMoE (arXiv:2310.16795), section 4.

Shapes: R rows (outputs), C columns (inputs), W words.
"""

import ctypes
from collections.abc import Mapping
from functools import cache
from itertools import combinations, islice
from math import ceil, comb, log
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..native.kernel_matrix import TERNARY, KernelMatrix
from ..native.library import NUMBER, POINTER, c_function

WORDS = 1 << 16
"""Runs that have a word, as in QMoE: their table takes half a megabyte, which the second cache of a core holds."""
MOST_PAIRS = 14
"""Pairs of weights of a run: 28 weights of two bits, and four bits for the length, as in QMoE."""
LENGTH_BITS = 4
"""Of an entry, for the number of its pairs; 60 bits in all with the longest run."""
ZERO_SHARES = (0.7, 0.8, 0.885, 0.94)
"""Shares of zeros that dictionaries are made for; the third is QMoE's, the others are spread around it, not tuned."""
ROLES = ("low", "high", "starts", "words")


@cache
def dictionary(number: int) -> NDArray[np.uint64]:
    """What each word stands for: its pairs of weights in the lowest four bits, then two bits for each weight.

    1 is the number above zero, 2 that below. Every beginning of a run is a run, and so is every single pair.

    Args:
        number: of the share of zeros in ZERO_SHARES.
    """
    zero = ZERO_SHARES[number]
    runs = [(pairs, others) for pairs in range(1, MOST_PAIRS + 1) for others in range(2 * pairs + 1)]

    def rarity(run: tuple[int, int]) -> tuple[float, int]:
        pairs, others = run
        return -(2 * pairs - others) * log(zero) - others * log((1 - zero) / 2), pairs

    found, left = [], WORDS
    for pairs, others in sorted(runs, key=rarity):
        signs = 1 << others
        count = min(left, comb(2 * pairs, others) * signs)
        some = list(islice(combinations(range(2 * pairs), others), ceil(count / signs)))
        places = np.array(some, dtype=np.uint64).reshape(len(some), 1, others)
        is_below = np.arange(signs)[:, None] >> np.arange(others) & 1
        weight = (1 + is_below).astype(np.uint64) << (LENGTH_BITS + 2 * places)
        entries = weight.sum(-1, dtype=np.uint64).reshape(-1)[:count] + np.uint64(pairs)
        found.append(entries)
        left -= count
        if not left:
            break
    return np.concatenate(found)


@cache
def _children(number: int) -> NDArray[np.int32]:
    """For each run and pair of weights: the run with that pair behind it, or 0. Run 0 is empty, others are word + 1."""
    entries = dictionary(number)
    pairs = entries & np.uint64(15)
    last = entries >> (LENGTH_BITS + 4 * (pairs - np.uint64(1))) & np.uint64(15)
    before = entries - np.uint64(1) - (last << (LENGTH_BITS + 4 * (pairs - np.uint64(1))))
    order = np.argsort(entries)
    place = np.minimum(np.searchsorted(entries, before, sorter=order), WORDS - 1)
    parent = np.where(pairs == 1, 0, order[place] + 1)
    children = np.zeros((WORDS + 1, 16), dtype=np.int32)
    children[parent, last] = np.arange(1, WORDS + 1)
    return children


def encode(sign_RC: torch.Tensor, low_R: torch.Tensor, high_R: torch.Tensor) -> tuple[int, dict[str, torch.Tensor]]:
    """A matrix of signs as it is stored.

    Args:
        sign_RC: -1, 0 or 1.
        low_R: what -1 stands for.
        high_R: what 1 stands for.

    Returns:
        The number of its dictionary, and its parts, uint8.
    """
    share = float((sign_RC == 0).float().mean())
    number = min(range(len(ZERO_SHARES)), key=lambda each: abs(ZERO_SHARES[each] - share))
    code_RC = torch.where(sign_RC < 0, 2, sign_RC).to(torch.uint8).numpy()
    code_RC = np.pad(code_RC, ((0, 0), (0, code_RC.shape[1] % 2)))
    words, counts = _words(code_RC[:, ::2] | code_RC[:, 1::2] << 2, number)
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    parts = {"low": _stored(low_R), "high": _stored(high_R)}
    parts |= {"starts": torch.from_numpy(starts.view(np.uint8)), "words": torch.from_numpy(words.view(np.uint8))}
    return number, parts


def _words(pair_RP: NDArray[np.uint8], number: int) -> tuple[NDArray[np.uint16], NDArray[np.int64]]:
    """The longest runs one after the other, of all rows at the same time; the words, and how many each row has."""
    children, (rows, width) = _children(number), pair_RP.shape
    # a pair that no run has, so that no run goes beyond the row
    pair_RP = np.pad(pair_RP, ((0, 0), (0, MOST_PAIRS)), constant_values=15)
    place_R, steps = np.zeros(rows, dtype=np.int64), []
    while (live := np.flatnonzero(place_R < width)).size:
        run, growing = np.zeros(live.size, dtype=np.int32), np.arange(live.size)
        for pair in range(MOST_PAIRS):
            longer = children[run[growing], pair_RP[live[growing], place_R[live[growing]] + pair]]
            growing, longer = growing[longer > 0], longer[longer > 0]
            run[growing] = longer
        place_R[live] += (dictionary(number)[run - 1] & np.uint64(15)).astype(np.int64)
        steps.append((live, (run - 1).astype(np.uint16)))
    row_W = np.concatenate([live for live, _ in steps])
    word_W = np.concatenate([words for _, words in steps])
    return word_W[np.argsort(row_W, kind="stable")], np.bincount(row_W, minlength=rows)


def part_bytes(rows: int, num_words: int) -> dict[str, int]:
    """Bytes of each part of a matrix, by role."""
    return {"low": 2 * rows, "high": 2 * rows, "starts": 4 * (rows + 1), "words": 2 * num_words}


def most_words(rows: int, columns: int) -> int:
    """Words of a matrix at most: one for each pair."""
    return rows * -(-columns // 2)


def decode(number: int, parts: Mapping[str, torch.Tensor], rows: int, columns: int) -> torch.Tensor:
    """The matrix that parts stand for, `[R, C]` bfloat16: the definition, which the C agrees with.

    Raises:
        ValueError: if the words are not those of whole rows.
    """
    width = columns + columns % 2
    entry_W = dictionary(number)[parts["words"].numpy().copy().view(np.uint16)]
    code_WX = (entry_W[:, None] >> (LENGTH_BITS + 2 * np.arange(2 * MOST_PAIRS, dtype=np.uint64))) & np.uint64(3)
    is_part_WX = np.arange(2 * MOST_PAIRS) < 2 * (entry_W & np.uint64(15)).astype(np.int64)[:, None]
    code = torch.from_numpy(code_WX[is_part_WX].astype(np.int64))
    if len(code) != rows * width:
        raise ValueError(f"{len(entry_W)} words stand for {len(code)} weights; expected {rows} rows of {width}")
    low_R, high_R = (parts[role].clone().view(torch.bfloat16) for role in ("low", "high"))
    value_RK = torch.stack([torch.zeros_like(low_R), high_R, low_R], dim=1)
    return value_RK.gather(1, code.view(rows, width)[:, :columns])


def kernel_matrix_of(number: int, parts: Mapping[str, torch.Tensor], rows: int, columns: int) -> KernelMatrix:
    """A matrix as our C multiplies it; it trusts the starts of rows, see `has_whole_rows`.

    Args:
        number: of the dictionary, a place in ZERO_SHARES.
        parts: uint8, by role.
        rows: R, 1 or more.
        columns: C, 1 or more.
    """
    addresses = (*(parts[role].data_ptr() for role in ROLES), dictionary(number).ctypes.data)
    return KernelMatrix(TERNARY, rows, columns, None, *addresses)


def has_whole_rows(parts: Mapping[str, torch.Tensor]) -> bool:
    """Whether rows follow each other: the first begins with the first word, the last ends with the last."""
    start = np.frombuffer(parts["starts"].numpy().tobytes(), "<i4")
    return bool(start[0] == 0 and start[-1] == parts["words"].numel() // 2 and (np.diff(start) >= 0).all())


def expand(number: int, parts: Mapping[str, torch.Tensor], out: torch.Tensor, *, is_transposed: bool) -> None:
    """Write a matrix as the model computes with it, in C where there is a compiler.

    Args:
        number: of the dictionary, a place in ZERO_SHARES.
        parts: uint8, by role.
        out: contiguous; `[C, R]` if `is_transposed`, else `[R, C]`.
        is_transposed: write the transpose.

    Raises:
        ValueError: if the words are not those of whole rows; the C fills what is missing with zeros instead.
    """
    rows, columns = out.shape[::-1] if is_transposed else out.shape
    if out.dtype != torch.bfloat16 or (function := _function()) is None:
        plain_RC = decode(number, parts, rows, columns)
        out.copy_(plain_RC.t() if is_transposed else plain_RC)
        return
    addresses = [parts[role].data_ptr() for role in ROLES]
    num_words = parts["words"].numel() // 2
    function(*addresses, num_words, dictionary(number).ctypes.data, rows, columns, out.data_ptr(), is_transposed)


@cache
def _function() -> Any:
    types = (*([POINTER] * 4), NUMBER, POINTER, NUMBER, NUMBER, POINTER, ctypes.c_int)
    return c_function("expertier_expand_ternary", *types)


def _stored(value_R: torch.Tensor) -> torch.Tensor:
    return value_R.bfloat16().contiguous().view(torch.uint8)
