"""The order of integers: the bits of its definition for codes of few bits and planes, everywhere, beside any rows."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from offload.codes.encoding import Encoding
from offload.codes.expander import kernel_matrix_of, kernel_number, kernel_parameters
from offload.codes.levels import LevelledScheme
from offload.compute.matvec import Matvecs
from offload.compute.orders import has_integers, integers_order, most_integer_rows
from offload.formats.lossy.levelled import joined
from offload.native.kernel_matrix import KernelMatrix, plain_matrix
from offload.native.library import FORBIDDING
from tests.random_codes import random_parts

SPAN, LANE = 256, 16


def rounded(values):
    """Float32 of a result that float64 has: as a multiplication and an addition that are rounded once."""
    return np.float32(values).astype(np.float64)


def in_units(x_C):
    """Integers of a row of x, up to whole spans, and the unit of each lane, as float64."""
    padded = np.zeros(-(-len(x_C) // SPAN) * SPAN)
    padded[: len(x_C)] = x_C
    lanes = padded.reshape(-1, LANE)
    largest = np.abs(lanes).max(1)
    exponent = np.where(largest > 0, np.frexp(largest)[1] - 1, -200)
    unit = 2.0 ** np.maximum(exponent - 13, -126)
    return np.rint(lanes / unit[:, None]), unit


def defined(weight, x_C):
    """One row of x times a matrix by the definition, as bfloat16.

    Args:
        weight: codes `[R, C]` from zero on, scales and zeros `[R, G]`, [(signs `[R, C]`, sizes `[R, G]`)], G's columns.
        x_C: float64.
    """
    code_RC, scale_RG, zero_RG, planes, group = weight
    rows, columns = code_RC.shape
    integer, unit = in_units(x_C)
    lane_group = np.minimum(np.arange(len(unit)) * LANE // group, scale_RG.shape[1] - 1)
    width = len(unit) * LANE
    padded = [np.pad(bits, ((0, 0), (0, width - columns))) for bits in (code_RC, *(2 * sign for sign, _ in planes))]
    sums = [(bits.reshape(rows, -1, LANE) * integer).sum(-1) for bits in padded]
    negative = np.zeros(scale_RG.shape[1])
    for lane in range(-(-columns // LANE)):
        negative[lane_group[lane]] = rounded(negative[lane_group[lane]] - unit[lane] * integer[lane].sum())
    excess_RG = rounded(zero_RG * scale_RG)
    for _, size_RG in planes:
        excess_RG = rounded(excess_RG + size_RG)
    total_R16 = np.zeros((rows, LANE))
    at_once = 1 if group > SPAN or scale_RG.shape[1] == 1 else LANE
    for g in range(scale_RG.shape[1]):
        total_R16[:, g % at_once] = rounded(total_R16[:, g % at_once] + excess_RG[:, g] * negative[g])
    for lane in range(len(unit)):
        g, j = lane_group[lane], lane % LANE
        of_lane = rounded(sums[0][:, lane] * scale_RG[:, g])
        for (_, size_RG), sum_RL in zip(planes, sums[1:], strict=True):
            of_lane = rounded(of_lane + sum_RL[:, lane] * size_RG[:, g])
        total_R16[:, j] = rounded(total_R16[:, j] + of_lane * unit[lane])
    while total_R16.shape[1] > 1:
        half = total_R16.shape[1] // 2
        total_R16 = rounded(total_R16[:, :half] + total_R16[:, half:])
    return torch.from_numpy(total_R16[:, 0]).float().bfloat16()


def floats(part, rows):
    return part.view(torch.bfloat16).double().view(rows, -1).numpy()


def bits_of(part, rows, columns, bits):
    byte = part.view(rows, -1).numpy()
    ones = np.unpackbits(byte, axis=1, bitorder="little")[:, : columns * bits].reshape(rows, columns, bits)
    return (ones << np.arange(bits)).sum(-1).astype(np.float64)


def make_codes(bits, zero, rows, columns, group, chance):
    product = "F32" if zero == "floats" else "BF16"
    encoding = Encoding(
        codes=f"offset{bits}", group_rows=1, group_columns=group, scale="BF16", product=product, zero=zero
    )
    parts = random_parts(encoding, rows, columns, chance)
    scales = floats(parts["scales"], rows)
    zeros = rounded(2 ** (bits - 1) + (floats(parts["zeros"], rows) if zero == "floats" else 0 * scales))
    weight = bits_of(parts["codes"], rows, columns, bits), scales, zeros, [], group or columns
    return kernel_matrix_of(encoding, rows, columns, parts), weight, parts


def make_planes(depth, rows, columns, group, chance):
    scheme = LevelledScheme("planes", group, 4)
    base, *planes = scheme.encode(0.02 * torch.randn(rows, columns, generator=chance))[:depth]
    stored = [joined(plane) for plane in planes]
    addresses = [base["codes"].data_ptr(), base["scales"].data_ptr(), base["zeros"].data_ptr(), 0]
    addresses += [plane.data_ptr() for plane in stored]
    parameter = kernel_parameters(scheme.base, columns, is_sum=True)
    matrix = KernelMatrix(kernel_number(scheme.base), rows, columns, parameter, *addresses)
    signs = [(bits_of(plane["codes"], rows, columns, 1), floats(plane["scales"], rows)) for plane in planes]
    zeros = rounded(2 + floats(base["zeros"], rows))
    weight = bits_of(base["codes"], rows, columns, 2), floats(base["scales"], rows), zeros, signs, group
    return matrix, weight, (base, stored, scheme.decode([base, *planes], rows, columns).double())


def multiplied(matrix, x_nD):
    out_nF = torch.full((len(x_nD), matrix.rows), 7.0, dtype=torch.bfloat16)
    integers_order().multiply(x_nD, [matrix], [out_nF])
    return out_nF


def uneven(rows, columns, chance):
    """Numbers of very different sizes, and a lane of zeros."""
    size_nD = 2.0 ** torch.randint(-40, 20, (rows, columns), generator=chance)
    x_nD = torch.randn(rows, columns, generator=chance) * torch.where(torch.arange(columns) % 3 == 0, size_nD, 1.0)
    x_nD[:, :LANE] = 0
    return x_nD.bfloat16()


SHAPES = [(33, 576, 64), (7, 80, 80), (40, 512, 16), (5, 1280, 256), (6, 1024, 512), (3, 37, 37), (9, 672, 32)]


def test_bits_of_the_definition():
    """Rows of a strip and more, columns that end within a span, within a lane and within a byte; 1 to 7 rows of x."""
    chance = torch.Generator().manual_seed(1)
    for rows, columns, group in SHAPES:
        made = [
            make_codes(bits, zero, rows, columns, 0 if group == columns else group, chance)
            for bits in (2, 3)
            for zero in ("none", "floats")
        ]
        made += [make_planes(depth, rows, columns, group, chance) for depth in (2, 3, 4)]
        for number, (matrix, weight, _held) in enumerate(made):
            assert has_integers(matrix)
            x_nD = uneven((1, 2, 4, 7)[number % 4], columns, chance)
            expected_nF = torch.stack([defined(weight, x_D.double().numpy()) for x_D in x_nD])
            assert torch.equal(multiplied(matrix, x_nD).view(torch.int16), expected_nF.view(torch.int16))


def test_a_sum_that_was_computed_by_hand():
    """Codes 0, 1, 2, 3 over and over, weights (code - 2 - 0.5) 0.25; x is 3 in the first lane, 1/512 in the second."""
    encoding = Encoding(codes="offset2", group_rows=1, group_columns=0, scale="BF16", product="F32", zero="floats")
    numbers = {role: torch.tensor([value]).bfloat16() for role, value in {"scales": 0.25, "zeros": 0.5}.items()}
    parts = {role: number.view(torch.uint8) for role, number in numbers.items()}
    parts["codes"] = torch.tensor([0b11100100] * 8, dtype=torch.uint8)
    x_1D = torch.tensor([[3.0] * 16 + [1 / 512] * 16]).bfloat16()
    # four times (-0.625 - 0.375 - 0.125 + 0.125) in each lane
    found_1F = multiplied(kernel_matrix_of(encoding, 1, 32, parts), x_1D)
    assert found_1F.item() == torch.tensor(-4 * (3 + 1 / 512)).bfloat16().item()


@pytest.mark.parametrize("depth", [1, 4])
def test_sums_are_as_close_as_the_page_says(depth):
    """Of terms that cancel, too: columns come a second time, and so do their weights, with the other sign of x."""
    chance = torch.Generator().manual_seed(2)
    matrix, _, (*_held, plain) = make_planes(depth, 40, 1024, 128, chance)
    half_nD = uneven(3, 512, chance)
    x_nD = torch.cat([half_nD, -half_nD.flip(1)], 1)
    expected_nF = x_nD.double() @ plain.t()
    largest_nL = x_nD.double().abs().view(3, -1, LANE).amax(-1)
    sizes_LF = plain.abs().view(40, -1, LANE).sum(-1).t()
    most_nF = (
        2**-14 * largest_nL @ sizes_LF + 2**-9 * expected_nF.abs() + 2**-18 * x_nD.double().abs() @ plain.abs().t()
    )
    assert ((multiplied(matrix, x_nD).double() - expected_nF).abs() <= most_nF).all()


def test_a_row_is_the_same_beside_others_and_with_any_threads():
    chance = torch.Generator().manual_seed(3)
    matrix, _, _held = make_planes(3, 200, 640, 128, chance)
    x_nD = uneven(19, 640, chance)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        together_nF = multiplied(matrix, x_nD)
        torch.set_num_threads(1)
        assert all(torch.equal(multiplied(matrix, x_nD[i : i + 1])[0], together_nF[i]) for i in (0, 3, 17, 18))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_never_a_number(value):
    chance = torch.Generator().manual_seed(4)
    matrix, _, _held = make_planes(2, 40, 640, 128, chance)
    x_nD = torch.randn(3, 640, generator=chance).bfloat16()
    x_nD[1, 639] = value
    found_nF = multiplied(matrix, x_nD)
    assert found_nF[1].isnan().all()
    assert found_nF[::2].isfinite().all()
    scale_RG = _held[0]["scales"].view(torch.bfloat16).view(40, 5)
    scale_RG[7, 4] = value
    found_nF = multiplied(matrix, x_nD[:1])
    assert not found_nF[0, 7].isfinite()
    assert found_nF[0, :7].isfinite().all()


def test_it_is_taken_only_where_bits_are_free():
    chance = torch.Generator().manual_seed(5)
    matrix, _, _held = make_planes(2, 64, 256, 128, chance)
    plain = plain_matrix(torch.zeros(64, 256, dtype=torch.bfloat16))
    odd = matrix._replace(columns=192, parameter=kernel_parameters(LevelledScheme("planes", 96, 2).base, 192))
    assert not has_integers(plain)
    assert not has_integers(odd)
    assert Matvecs("exact").free_order([matrix], 1) is Matvecs("fixed").free_order([matrix], 1) is None
    fast, most = Matvecs("fast"), most_integer_rows()
    assert fast.free_order([matrix, plain], 1) is None
    assert fast.free_order([matrix], most + 1) is None
    if most:
        assert fast.free_order([matrix], most) == integers_order()
        assert fast.names == {"64x256": "integers"}


@pytest.mark.slow  # the C is compiled anew for each
@pytest.mark.parametrize(
    "forbidden", ["amx,avx512_bf16,avx512_vbmi", "amx,avx512_bf16,avx512", "amx,avx512_bf16,avx512,avx2"]
)
def test_bits_do_not_depend_on_instruction_sets(forbidden):
    environment = os.environ | {FORBIDDING: f"amx,{forbidden}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "definition or hand"]
    done = subprocess.run(
        command, cwd=Path(__file__).parent.parent, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "2 passed" in done.stdout
