"""Byte n-gram models: the yardstick that a trained language model must clearly beat.

Source: Witten-Bell interpolation, Chen and Goodman 1999, section 2.5.
"""

import numpy as np
from numpy.typing import NDArray

# the vocabulary of text as bytes
BYTES = 256


def ngram_bits_per_byte(train: NDArray[np.uint8], held_out: NDArray[np.uint8], order: int) -> float:
    """Bits per byte on `held_out` of an interpolated n-gram model counted on `train`.

    Args:
        train: bytes to count.
        held_out: bytes to predict.
        order: 2 is a bigram, 3 a trigram.

    Raises:
        ValueError: if the order is not 1, 2 or 3, or a stream is shorter than it.
    """
    if order not in (1, 2, 3) or min(len(train), len(held_out)) < order:
        raise ValueError(f"order must be 1, 2 or 3 and the streams longer; got {order}, {len(train)}, {len(held_out)}")
    probability = np.full(len(held_out) - order + 1, 1 / BYTES)
    for n in range(1, order + 1):
        count = np.bincount(_grams(train, n), minlength=BYTES**n).reshape(-1, BYTES)
        gram = _grams(held_out, n)[order - n :]
        context, successor = gram // BYTES, gram % BYTES
        total, distinct = count.sum(axis=1)[context], (count > 0).sum(axis=1)[context]
        seen = np.maximum(total + distinct, 1)
        probability = np.where(total > 0, (count[context, successor] + distinct * probability) / seen, probability)
    return float(-np.log2(probability).mean())


def _grams(stream: NDArray[np.uint8], n: int) -> NDArray[np.int64]:
    """Every run of n bytes as one number, first byte most significant."""
    length = len(stream) - n + 1
    gram = np.zeros(length, np.int64)
    for offset in range(n):
        gram = gram * BYTES + stream[offset : offset + length]
    return gram
