"""Products of a few bfloat16 rows at the speed of memory: which order of summation computes which shape.

torch's own products of a few rows read weights at about half the speed of memory. Our C takes their place, under one of
three promises:

    exact   the bits of torch: each shape is tried against torch's product when it first occurs, with the number of rows
            and threads then in use; a shape that fails is left to torch
    fixed   the bits of our own C: one order of summation for each shape, whatever else is computed beside it
    fast    no promise; what is quickest: codes of few bits in sums of integers, whose weights are not rounded
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..formats.resident.stored_weight import expanded, kernel_matrix, stored_bytes
from ..native.kernel_matrix import KernelMatrix, plain_matrix
from .orders import (
    AMX_BLOCK,
    BLOCKS,
    Order,
    Shape,
    any_given,
    has_integers,
    integers_order,
    most_integer_rows,
    orders,
)

TRIALS = 4
"""Random inputs, 0.01 to 10 in size, that an order is tried on with the given weight. They need not be many: the sums
of `_cancelling` tell two orders of summation apart by themselves."""
MOST_TRIED_ROWS = 4096
"""Rows of the trial that needs a weight of its own: that of a vocabulary would take 0.9 to 5 GB. With more rows than
that the given weight shows another order of summation by itself: one output in thousands differs, in each trial."""
MOST_PARTS = 12
"""Parts that the columns of a product of several rows are cut into at most, each a block of whole tiles; oneDNN was
seen to cut 2,880 columns into 6."""
EDGE_ROWS = 32
"""First and last rows of an expert's matrix that an order is compared on: what torch computes of the others has no
other blocks, because a block is one for a product."""
MOST_ROWS = 16
"""Rows of x from which on torch's products, which compute blocks of many rows, are at least as quick as ours."""
ARITHMETICS = ("auto", "exact", "fixed", "fast")
SMALL_WEIGHTS = 1 << 18
"""Weights of a matrix whose product takes so little time (a quarter of a megabyte's reading at most) that it does not
matter who computes it; not tuned."""
MEMORY_TYPES = (torch.Tensor, nn.Parameter)
"""`TokenWeight` is stripped of its type where it is multiplied."""


class Matvecs:
    """Chooses an order of summation for each shape.

    Args:
        arithmetic: `exact`, `fixed` or `fast`.

    Raises:
        ValueError: if the arithmetic is unknown, or is not `exact` and there is no C compiler.
    """

    def __init__(self, arithmetic: str) -> None:
        if arithmetic not in ARITHMETICS[1:]:
            raise ValueError(f"arithmetic must be one of {', '.join(ARITHMETICS[1:])}; got {arithmetic!r}")
        self.arithmetic = arithmetic
        self._chosen: dict[tuple[int, int, int, int, bool], Order | None] = {}
        self._chosen_of_rows: dict[tuple[Shape, int, bool], dict[int, Order | None]] = {}
        self._in_integers: dict[Shape, Order] = {}
        try:
            self._orders = orders()
        except OSError as error:
            if arithmetic != "exact":
                raise ValueError(f'arithmetic="{arithmetic}": {error}; use "exact"') from error
            self._orders = ()

    def multiply(
        self,
        x_nD: torch.Tensor,
        weights_FD: Sequence[torch.Tensor],
        outs_nF: Sequence[torch.Tensor],
        biases_F: Sequence[torch.Tensor | None] = (),
    ) -> bool:
        """`outs[m] = x @ weights[m].t() + biases[m]`, if one order fits all; otherwise nothing is done: False.

        Args:
            x_nD: n rows, in any leading dimensions.
            weights_FD: matrices of the same width, all in one stored form; their numbers of rows may differ.
            outs_nF: where the results go, each contiguous.
            biases_F: a vector for each matrix, or None; none at all by default.
        """
        columns = weights_FD[0].shape[-1]
        rows = x_nD.numel() // columns if columns else 0
        if not (self._accepts(x_nD, rows, columns) and _are_usable(biases_F)):
            return False
        has_bias = any_given(biases_F)
        if (matrices := _matrices(weights_FD)) is None:
            return False
        order = self.free_order(matrices, rows) or self._common(weights_FD, rows, has_bias)
        if order is None:
            return False
        order.multiply(x_nD, matrices, outs_nF, biases=biases_F)
        return True

    def multiply_each(
        self, x_ND: torch.Tensor, weights_FD: Sequence[torch.Tensor], outs_F: Sequence[torch.Tensor]
    ) -> bool:
        """`outs[m] = weights[m] @ x[m]`: one row for each of N matrices; otherwise as `multiply`."""
        if not self._accepts(x_ND, len(weights_FD), weights_FD[0].shape[-1]):
            return False
        if (matrices := _matrices(weights_FD)) is None:
            return False
        if (order := self.free_order(matrices, 1) or self._common(weights_FD, 1)) is None:
            return False
        order.multiply(x_ND, matrices, outs_F, is_row_each=True)
        return True

    def common_order(
        self, weights_FD: Sequence[torch.Tensor], biases_F: Sequence[torch.Tensor | None] = ()
    ) -> Order | None:
        """The order of one row times matrices of the same width and form; None if none fits all of them.

        Args:
            weights_FD: matrices that `multiply` would take together.
            biases_F: as there.
        """
        if not self._orders or not _are_usable(biases_F) or (matrices := _matrices(weights_FD)) is None:
            return None
        return self.free_order(matrices, 1) or self._common(weights_FD, 1, any_given(biases_F))

    def free_order(self, matrices: Sequence[KernelMatrix], rows: int) -> Order | None:
        """The order of integers where nothing is promised and it is quickest for all of these matrices; else None.

        Args:
            matrices: that are multiplied by one rule.
            rows: rows of x.
        """
        if self.arithmetic != "fast" or not self._orders or rows > most_integer_rows():
            return None
        if not all(map(has_integers, matrices)):
            return None
        self._in_integers |= {(matrix.rows, matrix.columns): integers_order() for matrix in matrices}
        return integers_order()

    def experts_orders(self, shapes: Sequence[Shape]) -> list[Order] | None:
        """The order of each product of a whole expert, if our C computes them all by the same rule; else None.

        Args:
            shapes: rows and columns of each weight of an expert.
        """
        chosen = [self._order(shape, 1) for shape in shapes] if self._orders else [None]
        return _of_one_rule(chosen)

    def rows_orders(self, rooms_FD: Sequence[torch.Tensor], counts: Iterable[int]) -> dict[int, list[Order] | None]:
        """`experts_orders` for experts with several rows, bit-identical to torch's products of so many.

        Args:
            rooms_FD: for each weight of an expert, memory that has its shape and lies as torch multiplies it; the
                trial writes to it.
            counts: numbers of rows.
        """
        chosen = [self._orders_of_rows(room_FD, sorted(counts)) for room_FD in rooms_FD]
        return {count: _of_one_rule([of_room[count] for of_room in chosen]) for count in counts}

    def has_order(self, shape: Shape) -> bool:
        """Whether our C computes a row times a matrix of this shape as promised; small matrices are not tried."""
        if shape[0] * shape[1] <= SMALL_WEIGHTS:
            return True
        return self._choose((min(shape[0], MOST_TRIED_ROWS), shape[1]), 1, None) is not None

    def __deepcopy__(self, memo: dict[int, Any]) -> "Matvecs":
        """Copies of a model share it: it holds nothing but which order was chosen."""
        return self

    @property
    def is_row_alone(self) -> bool:
        """Whether a row's result is promised to be the same whatever other rows are computed with it."""
        return self.arithmetic == "fixed"

    @property
    def names(self) -> dict[str, str]:
        """What computes each shape met so far, for the report; shapes of several rows of x say how many."""
        chosen = {
            f"{rows}x{columns}" + (f" times {n}" if n > 1 else ""): "torch" if order is None else order.name
            for (rows, columns, n, _, _), order in self._chosen.items()
        }
        return chosen | {f"{rows}x{columns}": order.name for (rows, columns), order in self._in_integers.items()}

    def accepts(self, rows: int) -> bool:
        """Whether products of so many rows may be ours."""
        return bool(self._orders) and rows > 0 and (rows <= MOST_ROWS or self.is_row_alone)

    def multiplies_wide(self, rows: int) -> bool:
        """Whether float32 products of so many rows with bfloat16 matrices may be ours, whose order is not torch's."""
        return self.arithmetic != "exact" and self.accepts(rows)

    def _accepts(self, x: torch.Tensor, rows: int, columns: int) -> bool:
        return (
            self.accepts(rows)
            and is_in_memory(x)
            and x.dtype == torch.bfloat16
            and x.numel() == rows * columns
            and x.is_contiguous()
        )

    def _common(self, weights_FD: Sequence[torch.Tensor], rows: int, has_bias: bool = False) -> Order | None:
        first, *others = {self._order((len(weight), weight.shape[1]), rows, weight, has_bias) for weight in weights_FD}
        return None if others else first

    def _order(
        self, shape: Shape, rows: int, weight_FD: torch.Tensor | None = None, has_bias: bool = False
    ) -> Order | None:
        """What computes `rows` rows times this shape; tried on the given weight, or on a random one."""
        # only torch's products depend on how many rows and threads there are, and on whether there is a bias
        is_exact = self.arithmetic == "exact"
        key = (*shape, rows, torch.get_num_threads(), has_bias) if is_exact else (*shape, 1, 1, False)
        if key not in self._chosen:
            self._chosen[key] = self._choose(shape, rows, weight_FD, has_bias)
        return self._chosen[key]

    def _choose(self, shape: Shape, rows: int, weight_FD: torch.Tensor | None, has_bias: bool = False) -> Order | None:
        candidates = [order for order in self._orders if order.fits(shape)]
        if self.arithmetic != "exact":
            return next(iter(candidates), None)
        tried = torch.randn(shape).bfloat16() if weight_FD is None else expanded(weight_FD)
        blocks = [varied for order in candidates for varied in _with_blocks(order, shape[1])]
        return next((order for order in blocks if _equals_torch(order, tried, rows, has_bias)), None)

    def _orders_of_rows(self, room_FD: torch.Tensor, counts: Sequence[int]) -> dict[int, Order | None]:
        shape = (room_FD.shape[0], room_FD.shape[1])
        known = self._chosen_of_rows.setdefault((shape, torch.get_num_threads(), room_FD.is_contiguous()), {})
        if unknown := [count for count in counts if count not in known]:
            candidates = [order for order in self._orders if order.fits(shape)]
            blocks = [varied for order in candidates for varied in _with_parts(order, shape[1])]
            known.update(_orders_like_torch(blocks, room_FD, unknown))
        return known


def _of_one_rule(orders: Sequence[Order | None]) -> list[Order] | None:
    """Orders that one call of C can follow; None if it cannot follow them all."""
    found = [order for order in orders if order is not None]
    return found if len(found) == len(orders) and len({order.number for order in found}) == 1 else None


def is_in_memory(tensor: torch.Tensor) -> bool:
    """Whether a tensor's address is that of its numbers in host memory.

    Not so for fake tensors of compilers, tensors that a transform such as vmap has wrapped, and subclasses that
    compute something else than they hold. Those go to torch's own operations.
    """
    return (
        type(tensor) in MEMORY_TYPES
        and tensor.device.type == "cpu"
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


def _matrices(weights_FD: Sequence[torch.Tensor]) -> list[KernelMatrix] | None:
    """As our C reads them; None if they are not all in memory, in one form and of one width."""
    matrices = []
    for weight in weights_FD:
        if weight.dtype != torch.bfloat16 or not is_in_memory(stored_bytes(weight)) or not weight.is_contiguous():
            return None
        matrix = kernel_matrix(weight)
        if matrix is None or matrix.columns != weights_FD[0].shape[-1]:
            return None
        matrices.append(matrix)
    first = matrices[0]
    is_one_form = all(matrix.form == first.form and matrix.parameter is first.parameter for matrix in matrices)
    return matrices if is_one_form else None


def _with_blocks(order: Order, columns: int) -> list[Order]:
    """An order with each block that makes a difference for so many columns."""
    if not order.block:
        return [order]
    blocks = [block for block in BLOCKS if block < columns]
    return [Order(order.name, order.number, order.alignment, block) for block in blocks]


def _with_parts(order: Order, columns: int) -> list[Order]:
    """An order with each block that torch may take for several rows, the largest first."""
    if order.name != "amx":
        return _with_blocks(order, columns)
    tiles = -(-columns // AMX_BLOCK)
    blocks = dict.fromkeys(AMX_BLOCK * -(-tiles // parts) for parts in range(2, MOST_PARTS + 1))
    return [replace(order, block=block) for block in (0, *blocks)]


def _orders_like_torch(
    orders: Sequence[Order], room_FD: torch.Tensor, counts: Sequence[int]
) -> dict[int, Order | None]:
    """The first order that is bit-identical to torch's product of so many rows, on rounding errors alone.

    Args:
        orders: to be tried.
        room_FD: memory for the weight of the trial, as torch is to multiply it.
        counts: numbers of rows of x.
    """
    x_nD = _fill_cancelling(room_FD, max(counts), torch.Generator().manual_seed(0))
    rows = torch.arange(len(room_FD))
    edges_F = torch.cat([rows[:EDGE_ROWS], rows[-EDGE_ROWS:]])
    edge_FD, found, likely = room_FD[edges_F].contiguous(), dict[int, Order | None](), list(orders)
    for count in counts:
        x_mD = x_nD[:count]
        expected_mF = torch.mm(x_mD, room_FD.t())[:, edges_F]
        found[count] = next((order for order in likely if _gives(order, x_mD, edge_FD, expected_mF)), None)
        if (best := found[count]) is not None:  # about as many rows are likely to be multiplied alike
            likely = [best, *(order for order in likely if order != best)]
    return found


def _gives(order: Order, x_nD: torch.Tensor, weight_FD: torch.Tensor, expected_nF: torch.Tensor) -> bool:
    found_nF = torch.empty_like(expected_nF)
    order.multiply(x_nD, (plain_matrix(weight_FD),), (found_nF,))
    return torch.equal(found_nF, expected_nF)


def _fill_cancelling(out_FD: torch.Tensor, rows: int, generator: torch.Generator) -> torch.Tensor:
    """As `_cancelling`, with several rows of x, written in place; the terms come again from the last to the first.

    Rows of the weight are the same numbers, shifted by one, which takes a tenth of the time of fresh ones.
    """
    height, half = len(out_FD), out_FD.shape[1] // 2
    numbers = torch.randn(height + half, generator=generator).bfloat16()
    out_FD[:, :half] = numbers.as_strided((height, half), (1, 1))
    out_FD[:, half : 2 * half] = -out_FD[:, :half].flip(1)
    out_FD[:, 2 * half :] = 0
    x_nH = torch.randn(rows, half, generator=generator).bfloat16()
    return torch.cat([x_nH, x_nH.flip(1), x_nH.new_zeros(rows, out_FD.shape[1] % 2)], dim=1)


def _equals_torch(order: Order, weight_FD: torch.Tensor, rows: int, has_bias: bool) -> bool:
    """Whether an order is bit-identical to torch on the given weight, and on products that are rounding errors alone.

    The latter tell any two orders of summation apart. Of ordinary sums, rounded to bfloat16, only one in thousands
    differs.
    """
    generator = torch.Generator().manual_seed(0)
    x_1D, tried_FD = _cancelling(min(len(weight_FD), MOST_TRIED_ROWS), weight_FD.shape[1], generator)
    x_nD = _several(x_1D, rows)
    # models that hold inputs as rows multiply the transpose; ours stand for a single row of theirs
    turned_DF = tried_FD.t().contiguous()
    is_alike = rows > 1 or torch.equal(torch.mm(x_nD, turned_DF), torch.mm(x_nD, tried_FD.t()))
    # a bias hides rounding errors, so sums are compared without it, too
    if not (is_alike and all(_agree(order, x_nD, tried_FD, adds) for adds in {False, has_bias})):
        return False
    shape = (rows, weight_FD.shape[1])
    given = [torch.randn(shape, generator=generator).mul_(10.0 ** (trial - 2)).bfloat16() for trial in range(TRIALS)]
    return all(_agree(order, x_nD, weight_FD, has_bias) for x_nD in given)


def _agree(order: Order, x_nD: torch.Tensor, weight_FD: torch.Tensor, has_bias: bool) -> bool:
    matrix, found_nF = kernel_matrix(weight_FD), weight_FD.new_empty(len(x_nD), len(weight_FD))
    assert matrix is not None
    # a bias as small as the rounding errors shows whether it is added before or after rounding
    bias_F = torch.linspace(-1, 1, len(weight_FD)).bfloat16() if has_bias else None
    order.multiply(x_nD, (matrix,), (found_nF,), biases=(bias_F,))
    linear_nF = nn.functional.linear(x_nD[None], weight_FD, bias_F)[0]
    is_mm = has_bias or torch.equal(torch.mm(x_nD, weight_FD.t()), found_nF)
    return is_mm and torch.equal(linear_nF, found_nF)


def _are_usable(biases_F: Sequence[torch.Tensor | None]) -> bool:
    return all(
        bias is None or (is_in_memory(bias) and bias.dtype == torch.bfloat16 and bias.is_contiguous())
        for bias in biases_F
    )


def _several(x_1D: torch.Tensor, rows: int) -> torch.Tensor:
    """The row and multiples of it, whose sums of rounding errors differ."""
    return torch.cat([x_1D * (1 + 0.5 * row) for row in range(rows)])


def _cancelling(rows: int, columns: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """[1, D] and [F, D] whose product would be 0 without rounding: every term comes a second time, negative."""
    half = columns // 2
    place_D = torch.randperm(columns, generator=generator)
    x_1D, weight_FD = torch.zeros(1, columns).bfloat16(), torch.zeros(rows, columns).bfloat16()
    x_1H = torch.randn(1, half, generator=generator).bfloat16()
    weight_FH = torch.randn(rows, half, generator=generator).bfloat16()
    for places, sign in ((place_D[:half], 1), (place_D[half : 2 * half], -1)):
        x_1D[:, places], weight_FD[:, places] = x_1H, sign * weight_FH
    return x_1D, weight_FD
