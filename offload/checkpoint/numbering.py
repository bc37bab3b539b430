"""Where each element of a converted parameter comes from: the conversion is run on numbers instead of weights.

Every element of a source has the number of its row (all axes but the last) and of its column. Both are passed through
the conversion, one after the other, as views that take no memory before it and small whole numbers after it.

Most conversions move whole rows. That shows in numbers of one digit at a time: of an expert of 60 million elements, 60
MB for each copy that its conversion makes. Others are given whole numbers, which take several times that.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod

import torch

PIECE_ELEMENTS = 1 << 20
"""Elements that are looked at together: their numbers take 8 MB. Others were not tried."""
DIGIT_BITS = 8
"""What a byte holds of a number."""

Convert = Callable[[list[torch.Tensor]], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What a conversion does to elements.

    Args:
        shape: of what it gives.
        is_whole: whether every element of the sources is there exactly once.
        starts: places, in the flattened result, where a run of successive elements begins; only the first of them, if
            there are more than asked for.
        numbers: which element of the sources, counted through, is at each start.
    """

    shape: tuple[int, ...]
    is_whole: bool
    starts: tuple[int, ...]
    numbers: tuple[int, ...]


def trace_elements(convert: Convert, shapes: Sequence[tuple[int, ...]], most_runs: int) -> Origin:
    """Find the origin of every element.

    Args:
        convert: gives one tensor of those of `shapes`, and changes their order only.
        shapes: what each source is, of one axis or more.
        most_runs: starts that are kept, and one more.
    """
    moved = _trace_rows(convert, shapes, most_runs)
    return _trace_elements(convert, shapes, most_runs) if moved is None else moved


def _trace_rows(convert: Convert, shapes: Sequence[tuple[int, ...]], most_runs: int) -> Origin | None:
    """Find the origin of every row; None if a conversion does more than move whole rows."""
    counts, width = [prod(shape[:-1]) for shape in shapes], shapes[0][-1]
    count = sum(counts)
    if any(shape[-1] != width for shape in shapes):
        return None
    rows = [each.view(*shape[:-1], 1) for each, shape in zip(torch.arange(count).split(counts), shapes, strict=True)]
    shape: tuple[int, ...] = ()
    row_R = torch.zeros(count, dtype=torch.int64)
    for shift, converted in _digits(convert, rows, shapes, count):
        shape, digit_RD = tuple(converted.shape), converted.reshape(-1, converted.shape[-1])
        if digit_RD.shape != (count, width) or not torch.equal(digit_RD, digit_RD[:, :1].expand(count, width)):
            return None
        row_R += digit_RD[:, 0].long() << shift
    column_D = torch.arange(width)
    for shift, converted in _digits(convert, [column_D] * len(shapes), shapes, width):
        if not torch.equal(converted.reshape(-1, width), _digit(column_D, shift).expand(count, width)):
            return None
    breaks_r = torch.cat([torch.zeros(1, dtype=torch.int64), (row_R.diff() != 1).nonzero()[:, 0] + 1])[: most_runs + 1]
    return Origin(
        shape=shape,
        is_whole=torch.equal(row_R.sort().values, torch.arange(count)),
        starts=tuple((breaks_r * width).tolist()),
        numbers=tuple((row_R[breaks_r] * width).tolist()),
    )


def _digits(
    convert: Convert, numbers: Sequence[torch.Tensor], shapes: Sequence[tuple[int, ...]], count: int
) -> Iterator[tuple[int, torch.Tensor]]:
    """Each digit of numbers below `count`: its place in bits, and what a conversion makes of it."""
    for shift in range(0, max((count - 1).bit_length(), 1), DIGIT_BITS):
        yield shift, convert([_digit(each, shift).expand(shape) for each, shape in zip(numbers, shapes, strict=True)])


def _digit(numbers: torch.Tensor, shift: int) -> torch.Tensor:
    return (numbers >> shift & (1 << DIGIT_BITS) - 1).to(torch.uint8)


def _trace_elements(convert: Convert, shapes: Sequence[tuple[int, ...]], most_runs: int) -> Origin:
    """Find the origin of every element, from whole numbers."""
    row_of, column_of = convert(_rows(shapes)), convert(_columns(shapes))
    count = sum(map(prod, shapes))
    shape = tuple(row_of.shape)
    if row_of.numel() != count:
        return Origin(shape=shape, is_whole=False, starts=(), numbers=())
    first_of_row = torch.cat([_firsts(shape, start) for shape, start in zip(shapes, _starts(shapes), strict=False)])
    seen = torch.zeros(count, dtype=torch.bool)
    starts: list[int] = []
    numbers: list[int] = []
    last = -2
    for begin, number_n in _pieces(row_of.reshape(-1), column_of.reshape(-1), first_of_row):
        seen[number_n] = True
        if len(starts) <= most_runs:
            before = torch.cat([torch.tensor([last]), number_n[:-1]])
            for place in (number_n - before != 1).nonzero()[: most_runs + 1 - len(starts), 0].tolist():
                starts.append(begin + place)
                numbers.append(int(number_n[place]))
        last = int(number_n[-1])
    return Origin(shape=shape, is_whole=bool(seen.all()), starts=tuple(starts), numbers=tuple(numbers))


def _pieces(
    row_of: torch.Tensor, column_of: torch.Tensor, first_of_row: torch.Tensor
) -> Iterator[tuple[int, torch.Tensor]]:
    for begin in range(0, row_of.numel(), PIECE_ELEMENTS):
        piece = slice(begin, begin + PIECE_ELEMENTS)
        yield begin, first_of_row[row_of[piece].long()] + column_of[piece]


def _small(most: int) -> torch.dtype:
    return torch.int16 if most <= torch.iinfo(torch.int16).max else torch.int32


def _rows(shapes: Sequence[tuple[int, ...]]) -> list[torch.Tensor]:
    counts = [prod(shape[:-1]) for shape in shapes]
    dtype = _small(sum(counts))
    found = []
    for shape, start, count in zip(shapes, accumulate(counts, initial=0), counts, strict=False):
        found.append(torch.arange(start, start + count).to(dtype).view(*shape[:-1], 1).expand(shape))
    return found


def _columns(shapes: Sequence[tuple[int, ...]]) -> list[torch.Tensor]:
    dtype = _small(max(shape[-1] for shape in shapes))
    return [torch.arange(shape[-1]).to(dtype).expand(shape) for shape in shapes]


def _starts(shapes: Sequence[tuple[int, ...]]) -> Iterator[int]:
    return accumulate(map(prod, shapes), initial=0)


def _firsts(shape: tuple[int, ...], start: int) -> torch.Tensor:
    """Number of the first element of each row."""
    return start + torch.arange(prod(shape[:-1])) * shape[-1]
