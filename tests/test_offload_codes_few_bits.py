"""Codes of two and three bits, and planes that add to them: our C gives the bits of the definition, everywhere."""

import pytest
import torch

from offload.codes.decode import decode
from offload.codes.encoding import Encoding
from offload.codes.expander import (
    block_parameters,
    expand,
    expand_matrix,
    has_exact_kernel,
    kernel_matrix_of,
    kernel_number,
    kernel_parameters,
)
from offload.codes.levels import LevelledScheme
from offload.compute.orders import orders
from offload.formats.lossy.levelled import joined
from offload.native.kernel_matrix import BLOCKS, PARTS, KernelMatrix, plain_matrix
from tests.random_codes import random_parts


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("zero", ["none", "floats"])
@pytest.mark.parametrize(
    ("rows", "columns", "group"),
    [(40, 256, 64), (33, 96, 16), (7, 80, 0), (3, 37, 0), (64, 160, 32), (9, 640, 128), (6, 576, 192), (5, 352, 0)],
)
def test_expansion_has_the_bits_of_the_definition(bits, zero, rows, columns, group):
    product = "F32" if zero == "floats" else "BF16"
    encoding = Encoding(
        codes=f"offset{bits}",
        group_rows=1,
        group_columns=group,
        scale="BF16",
        product=product,
        zero=zero,
        is_word_aligned=True,
    )
    assert has_exact_kernel(encoding)
    parts = random_parts(encoding, rows, columns, torch.Generator().manual_seed(bits))
    expected = decode(encoding, parts, rows, columns, torch.bfloat16)
    for is_transposed in (False, True):
        out = torch.empty((columns, rows) if is_transposed else (rows, columns), dtype=torch.bfloat16)
        assert expand(encoding, parts, rows, columns, out, is_transposed=is_transposed)
        got = out.t() if is_transposed else out
        assert torch.equal(got.contiguous().view(torch.int16), expected.view(torch.int16))


def test_what_the_c_does_not_know_is_left_to_torch():
    usual = {"codes": "offset3", "group_rows": 1, "group_columns": 64, "scale": "BF16"}
    assert has_exact_kernel(Encoding(**usual))
    for other in ({"scale": "F16"}, {"zero": "packed"}, {"group_rows": 2}, {"product": "F16"}):
        assert not has_exact_kernel(Encoding(**{**usual, **other}))
    assert not has_exact_kernel(Encoding(codes="offset4", group_rows=1, group_columns=64, scale="BF16", has_order=True))


@pytest.mark.parametrize("zero", ["none", "floats"])
@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize(("shape", "group"), [((64, 320), 64), ((39, 512), 128), ((32, 576), 0), ((35, 512), 256)])
def test_products_have_the_bits_of_the_decoded_matrix(bits, zero, shape, group):
    """Spans that are expanded at once, and what they leave over; strips whose rows are no multiple of four."""
    chance = torch.Generator().manual_seed(6)
    numbers = {"scale": "BF16", "zero": zero, "product": "F32" if zero == "floats" else "BF16"}
    encoding = Encoding(codes=f"offset{bits}", group_rows=1, group_columns=group, **numbers)
    parts = random_parts(encoding, *shape, chance)
    parts["scales"].view(torch.bfloat16)[:3] = torch.tensor([0.0, 1e-39, 3e38])
    stored, plain = kernel_matrix_of(encoding, *shape, parts), decode(encoding, parts, *shape, torch.bfloat16)
    for order in (order for order in orders() if order.fits(shape)):
        for rows in (1, 16):
            x_nD = torch.randn(rows, shape[1], generator=chance).bfloat16()
            got_nF, expected_nF = (torch.empty(rows, shape[0], dtype=torch.bfloat16) for _ in range(2))
            order.multiply(x_nD, [stored], [got_nF])
            order.multiply(x_nD, [plain_matrix(plain)], [expected_nF])
            assert torch.equal(got_nF.view(torch.int16), expected_nF.view(torch.int16))


@pytest.mark.parametrize(("shape", "group"), [((64, 256), 128), ((96, 192), 16), ((32, 576), 64), ((38, 512), 256)])
def test_products_from_planes_have_the_bits_of_the_decoded_matrix(shape, group):
    """At every depth, beside a matrix of another depth, whichever order sums."""
    chance = torch.Generator().manual_seed(4)
    scheme = LevelledScheme("planes", group, 4)
    w_RC = 0.02 * torch.randn(shape, generator=chance)
    levels = scheme.encode(w_RC)
    planes = [joined(level) for level in levels[1:]]
    base = (levels[0]["codes"].data_ptr(), levels[0]["scales"].data_ptr(), levels[0]["zeros"].data_ptr(), 0)
    parameter = kernel_parameters(scheme.base, shape[1], is_sum=True)
    stored, plain = [], []
    for depth in (1, 2, 3, 4):
        addresses = [*base, *(plane.data_ptr() for plane in planes[: depth - 1])]
        stored.append(KernelMatrix(kernel_number(scheme.base), *shape, parameter, *addresses))
        plain.append(scheme.decode(levels[:depth], *shape).bfloat16())
    for order in orders():
        if not order.fits(shape):
            continue
        for rows in (1, 5, 20):
            x_nD = torch.randn(rows, shape[1], generator=chance).bfloat16()
            got, expected = ([torch.empty(rows, shape[0], dtype=torch.bfloat16) for _ in plain] for _ in range(2))
            order.multiply(x_nD, stored, got)
            order.multiply(x_nD, [plain_matrix(each) for each in plain], expected)
            assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize(("shape", "ranks"), [((64, 256), 2), ((96, 192), 17), ((33, 77), 1)])
def test_residual_blocks_have_the_bits_of_the_definition(shape, ranks):
    """Expanded, turned or not, and multiplied in every order; with one level, some, and all that our C adds."""
    chance = torch.Generator().manual_seed(5)
    scheme = LevelledScheme("residual", ranks, PARTS)
    levels = scheme.encode(0.02 * torch.randn(shape, generator=chance))
    stored = [joined(level) for level in levels]
    for depth in (1, 3, PARTS):
        plain_RC = scheme.decode(levels[:depth], *shape).bfloat16()
        matrix = KernelMatrix(BLOCKS, *shape, block_parameters(ranks), *(each.data_ptr() for each in stored[:depth]))
        for is_transposed in (False, True):
            out = torch.empty(shape[::-1] if is_transposed else shape, dtype=torch.bfloat16)
            assert expand_matrix(matrix, out, is_transposed=is_transposed)
            assert torch.equal(out.t() if is_transposed else out, plain_RC)
        for order in (order for order in orders() if order.fits(shape)):
            for rows in (1, 5, 20):
                x_nD = torch.randn(rows, shape[1], generator=chance).bfloat16()
                got_nF, expected_nF = (torch.empty(rows, shape[0], dtype=torch.bfloat16) for _ in range(2))
                order.multiply(x_nD, [matrix], [got_nF])
                order.multiply(x_nD, [plain_matrix(plain_RC)], [expected_nF])
                assert torch.equal(got_nF, expected_nF)
