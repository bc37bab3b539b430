"""Blocks of GGUF files as numbers: our C and its plain version against the package that defines every type."""

import ctypes

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from offload.formats.gguf_expand import expand_rows
from offload.native.library import FOLDER, library
from routing import compile_library

OURS = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4"]
OTHERS = ["IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S", "IQ1_M", "TQ1_0", "TQ2_0"]
SHAPES = ((1, 256), (33, 768), (64, 1280))
POINTER, NUMBER = ctypes.c_void_p, ctypes.c_int64


@pytest.fixture(scope="module")
def plain_c():
    """The same C as a processor without AVX-512 and float16 instructions compiles it."""
    headers = (FOLDER / "bfloat16.h", FOLDER / "stored_matrix.h", FOLDER / "forms" / "gguf.h")
    flags = ["-ffp-contract=off", "-mno-avx512f", "-mno-f16c"]
    try:
        return compile_library((FOLDER / "gguf.c",), headers=headers, flags=flags)
    except OSError as error:
        pytest.skip(str(error))


def random_blocks(kind, rows, columns, seed=0):
    """Every byte may be anything: scales are infinite, subnormal or no number in some blocks."""
    size, nbytes = gguf.GGML_QUANT_SIZES[Kind[kind]]
    return np.random.default_rng(seed).integers(0, 256, (rows, columns // size * nbytes), dtype=np.uint8)


def rounded(values_FD):
    """Float32 -> bfloat16 by whole numbers, which no processor's way with subnormals changes."""
    bits = values_FD.view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def expect_same(kind, stored_FB, found_FD):
    """Equal bits; where the definition gives no number, no number."""
    with np.errstate(all="ignore"):
        expected_FD = gguf.quants.dequantize(stored_FB, Kind[kind])
    is_nan = np.isnan(expected_FD)
    found_bits = found_FD.view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(found_FD.isnan().numpy(), is_nan)
    assert np.array_equal(found_bits[~is_nan], rounded(expected_FD)[~is_nan])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", OURS + OTHERS)
def test_numbers_are_those_of_the_package(kind, shape):
    stored_FB = random_blocks(kind, *shape)
    found_FD = torch.empty(shape, dtype=torch.bfloat16)
    expand_rows(kind, torch.from_numpy(stored_FB).view(-1), found_FD)
    if kind in OTHERS:  # torch rounds here, and its way with subnormals is its own
        with np.errstate(all="ignore"):
            expected_FD = torch.from_numpy(gguf.quants.dequantize(stored_FB, Kind[kind])).bfloat16()
        assert torch.equal(found_FD.nan_to_num(), expected_FD.nan_to_num())
    else:
        expect_same(kind, stored_FB, found_FD)


@pytest.mark.parametrize("kind", OURS)
def test_plain_c_has_the_same_bits(kind, plain_c):
    rows, columns = 33, 768
    stored_FB = random_blocks(kind, rows, columns, seed=1)
    plain_c.expertier_expand_gguf.argtypes = [ctypes.c_int, POINTER, NUMBER, NUMBER, POINTER, NUMBER]
    found_FD = torch.empty(rows, columns, dtype=torch.bfloat16)
    plain_c.expertier_expand_gguf(Kind[kind].value, stored_FB.ctypes.data, rows, columns, found_FD.data_ptr(), columns)
    expect_same(kind, stored_FB, found_FD)


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_1", "MXFP4", "Q8_0"])
def test_small_blocks_need_a_multiple_of_32_columns_only(kind):
    for columns in (32, 96, 576, 1408, 2880):
        stored_FB = random_blocks(kind, 3, columns)
        found_FD = torch.empty(3, columns, dtype=torch.bfloat16)
        expand_rows(kind, torch.from_numpy(stored_FB).view(-1), found_FD)
        expect_same(kind, stored_FB, found_FD)


@pytest.mark.parametrize("kind", ["Q4_K", "Q4_0", "IQ3_S"])
def test_rows_may_lie_apart_and_nothing_between_is_touched(kind):
    stored_FB = random_blocks(kind, 5, 256)
    room_FD = torch.full((10, 256), 7.0, dtype=torch.bfloat16)
    expand_rows(kind, torch.from_numpy(stored_FB).view(-1), room_FD[1::2])
    assert (room_FD[::2] == 7).all()
    whole_FD = torch.empty(5, 256, dtype=torch.bfloat16)
    expand_rows(kind, torch.from_numpy(stored_FB).view(-1), whole_FD)
    assert torch.equal(room_FD[1::2].nan_to_num(), whole_FD.nan_to_num())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes_are_rounded_once(dtype):
    values_FD = np.random.default_rng(0).normal(size=(4, 512)).astype(np.float32)
    stored_FB = gguf.quants.quantize(values_FD, Kind.Q4_1)
    found_FD = torch.empty(4, 512, dtype=dtype)
    expand_rows("Q4_1", torch.from_numpy(stored_FB).view(-1), found_FD)
    assert torch.equal(found_FD, torch.from_numpy(gguf.quants.dequantize(stored_FB, Kind.Q4_1)).to(dtype))


@pytest.mark.parametrize(("kind", "dtype"), [("F32", np.float32), ("F16", np.float16)])
def test_plain_types(kind, dtype):
    values_FD = np.random.default_rng(0).normal(size=(4, 40)).astype(dtype)
    found_FD = torch.empty(4, 40, dtype=torch.bfloat16)
    expand_rows(kind, torch.from_numpy(values_FD).view(-1).view(torch.uint8), found_FD)
    assert torch.equal(found_FD, torch.from_numpy(values_FD).bfloat16())


def test_our_c_knows_these_types_and_no_others():
    found = library()
    known = [kind.name for kind in Kind if found.expertier_expands_gguf(kind.value)]
    assert sorted(known) == sorted(OURS)
