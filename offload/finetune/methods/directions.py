"""Random directions of signs, drawn from seeds, and steps of weights along them.

Numbers come from SFC64 generators (Doty-Humphrey, PractRand; numpy's SFC64). Eight run side by side, because a vector
of our C holds eight; each block of numbers has eight of its own, because then any thread may draw it.

`perturbed` and `moved` say what a step is, in torch's operations. `visit` does all that an expert's weights need in
their slot; of bfloat16 weights our C does it in one pass, with the same bits.
"""

import ctypes
import functools
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from ...native.library import NUMBER, POINTER, c_function

PIECE = 1 << 18
"""Numbers at a time: 1 MiB in float32, which stays in a core's cache from one operation to the next. Not tuned."""
LANES, WARM_UP, BLOCK = 8, 18, 1 << 16
"""Generators of a block; numbers that each draws in vain at first, as in PractRand; and signs, or chances, of a block.
As in directions.c."""
SIGNS_OF_WORD, CHANCES_OF_WORD = 64, 4
"""A sign takes one bit of 64, a chance 16."""
Move = tuple["Direction", float]
"""A step: along which direction, against it, and how far."""


class Direction:
    """One random direction of one step for some tensors, drawn one tensor after the other.

    Args:
        seed: the run's, 0 or more.
        step: counts from 1.
        owner: a MoE layer, from 1, and an expert; or RESIDENT and the number of a parameter.
    """

    def __init__(self, seed: int, step: int, owner: tuple[int, int]) -> None:
        self.key = np.random.SeedSequence([seed, step, *owner]).generate_state(3, np.uint64)
        self._blocks = [0, 0]
        """Of signs and of chances that are drawn."""

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Signs, 1 or -1 in int8, of the shape of a tensor."""
        count = tensor.numel()
        bits = self._drawn(0, count, SIGNS_OF_WORD).view(np.uint8)
        signs = np.unpackbits(bits, count=count, bitorder="little").view(np.int8)
        return torch.from_numpy(signs).mul_(2).sub_(1).view(tensor.shape)

    def chances(self, count: int) -> torch.Tensor:
        """Numbers of 16 bits with a sign, each as likely, for as many weights."""
        return torch.from_numpy(self._drawn(1, count, CHANCES_OF_WORD).view(np.int16)[:count])

    def _drawn(self, kind: int, count: int, of_word: int) -> np.ndarray:
        """Numbers of 64 bits for a tensor."""
        first = self._blocks[kind]
        self._blocks[kind] += num_blocks(count)
        words, in_block, draw = -(-count // of_word), BLOCK // of_word, _draw()
        if draw is None:
            pieces = range(0, words, in_block)
            blocks = [self._block(2 * (first + n) + kind, in_block) for n, _ in enumerate(pieces)]
            return np.concatenate(blocks)[:words] if blocks else np.empty(0, np.uint64)
        found = np.empty(words, np.uint64)
        draw(self.key.ctypes.data, first, kind, in_block, words, found.ctypes.data)
        return found

    def _block(self, stream: int, words: int) -> np.ndarray:
        """A block's numbers, those of its generators in turn."""
        lanes = [self._generator(stream * LANES + lane).random_raw(words // LANES) for lane in range(LANES)]
        return np.stack(lanes, axis=1).reshape(-1)

    def _generator(self, number: int) -> np.random.SFC64:
        """One of the generators that share the key: its number is added to the last word."""
        found = np.random.SFC64(0)
        last = np.uint64((int(self.key[2]) + number) % 2**64)
        words = np.array([self.key[0], self.key[1], last, 1], np.uint64)
        found.state = {"bit_generator": "SFC64", "state": {"state": words}, "has_uint32": 0, "uinteger": 0}
        found.random_raw(WARM_UP)
        return found


def num_blocks(count: int) -> int:
    """Blocks that the numbers of a tensor take: the next tensor's begin with a block of their own."""
    return -(-count // BLOCK)


def perturbed(weight: torch.Tensor, direction: torch.Tensor, epsilon: float) -> torch.Tensor:
    """A weight at a distance along a direction, in its own dtype."""
    found = torch.empty(weight.shape, dtype=weight.dtype)
    pieces = zip(*(tensor.reshape(-1).split(PIECE) for tensor in (found, weight, direction)), strict=True)
    for to, of, along in pieces:
        # not in place: float32 weights are their own float32 copy
        to.copy_(of.float().add(along, alpha=epsilon))
    return found


def moved(weights: Sequence[torch.Tensor], by: Direction, size: float) -> list[torch.Tensor]:
    """Weights after a step of some size against its direction; all of an owner together, in their order.

    In bfloat16 they are rounded up or down by chance. A step changes far less than a bfloat16's last bit, and would be
    lost if it were rounded to the nearest. By chance it arrives on average.
    """
    directions = [by.of(weight) for weight in weights]
    if weights[0].dtype != torch.bfloat16:
        return [perturbed(weight, along, -size) for weight, along in zip(weights, directions, strict=True)]
    found = [torch.empty(weight.shape, dtype=weight.dtype) for weight in weights]
    for new, weight, direction in zip(found, weights, directions, strict=True):
        chance = by.chances(weight.numel())
        pieces = zip(*(tensor.reshape(-1).split(PIECE) for tensor in (new, weight, direction, chance)), strict=True)
        for to, of, along, odds in pieces:
            bits = of.float().add_(along, alpha=-size).view(torch.int32)
            # 0..65535 is added to what bfloat16 cuts off
            bits.add_(odds).add_(1 << 15).bitwise_and_(-(1 << 16))
            to.copy_(bits.view(torch.float32))
    return found


def visit(
    weights: Sequence[torch.Tensor],
    moves: Sequence[Move],
    copies: Sequence[torch.Tensor] | None = None,
    direction: Direction | None = None,
    epsilon: float = 0.0,
    sides: Sequence[Sequence[torch.Tensor]] = ((), ()),
) -> None:
    """Move weights where they lie, copy them, and show them at both ends of a direction.

    Args:
        weights: all of an owner, in their order; changed by `moves`, one after the other.
        moves: fresh directions, and how far to go.
        copies: where the moved weights go as well.
        direction: a fresh one; None shows nothing.
        epsilon: the distance of both ends.
        sides: where what is seen at the plus and at the minus end goes; nothing for an end that nobody looks at.
    """
    if (visit_one := _visit_for(weights)) is None:
        _visit_by_torch(weights, moves, copies, direction, epsilon, sides)
        return
    steps = (_Along * len(moves))(*(_Along.of(by, -size) for by, size in moves))
    seen = None if direction is None else ctypes.byref(_Along.of(direction, epsilon))
    firsts = accumulate((num_blocks(weight.numel()) for weight in weights), initial=0)
    for number, (weight, first) in enumerate(zip(weights, firsts, strict=False)):
        copy, plus, minus = (_address(tensors, number) for tensors in (copies, *sides))
        visit_one(weight.data_ptr(), weight.numel(), first, steps, len(moves), copy, seen, plus, minus)


def _visit_by_torch(
    weights: Sequence[torch.Tensor],
    moves: Sequence[Move],
    copies: Sequence[torch.Tensor] | None,
    direction: Direction | None,
    epsilon: float,
    sides: Sequence[Sequence[torch.Tensor]],
) -> None:
    for by, size in moves:
        for weight, new in zip(weights, moved(weights, by, size), strict=True):
            weight.copy_(new)
    for copy, weight in zip(copies or (), weights, strict=False):
        copy.copy_(weight)
    if direction is None:
        return
    signs = [direction.of(weight) for weight in weights]
    for side, size in zip(sides, (epsilon, -epsilon), strict=True):
        for to, weight, sign in zip(side, weights, signs, strict=False):
            to.copy_(perturbed(weight, sign, size))


class _Along(ctypes.Structure):
    """`struct along` of native/tuning/directions.c."""

    _fields_ = (("key", ctypes.c_uint64 * 3), ("size", ctypes.c_float))

    @classmethod
    def of(cls, direction: Direction, size: float) -> "_Along":
        return cls((ctypes.c_uint64 * 3)(*direction.key.tolist()), size)


def _address(tensors: Sequence[torch.Tensor] | None, number: int) -> int | None:
    return tensors[number].data_ptr() if tensors else None


def _visit_for(weights: Sequence[torch.Tensor]) -> Any:
    """Our C where it takes weights as they are, else None."""
    is_taken = all(
        weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and weight.is_contiguous() for weight in weights
    )
    return _visit() if is_taken else None


@functools.cache
def _draw() -> Any:
    """`expertier_draw`; None without a C compiler, as the other."""
    return c_function("expertier_draw", POINTER, NUMBER, ctypes.c_int, NUMBER, NUMBER, POINTER)


@functools.cache
def _visit() -> Any:
    return c_function("expertier_visit", POINTER, NUMBER, NUMBER, POINTER, NUMBER, *([POINTER] * 4))
