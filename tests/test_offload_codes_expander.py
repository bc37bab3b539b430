"""The C expanders against the definition in torch: random bytes, codes that are not numbers, extreme scales."""

import ctypes

import pytest
import torch

from offload.codes.decode import decode
from offload.codes.encoding import CODE_BITS, ITEM_BYTES, ROLES, Encoding
from offload.codes.expander import Parameters, Parts, expand, kernel_matrix_of
from offload.native.kernel_matrix import PARTS, PLAIN, KernelMatrix
from offload.native.library import FOLDER, HEADERS
from routing import compile_library

SHAPES = [(1, 32), (3, 48), (40, 64), (65, 200), (576, 96), (33, 320)]
MX = {"group_rows": 1, "group_columns": 32}
ENCODINGS = {
    "mxfp4": Encoding(codes="e2m1", scale="LDEXP", product="F64", **MX),
    "mxfp4 exp2": Encoding(codes="e2m1", scale="EXP2", **MX),
    "fp4": Encoding(codes="e2m1", scale="E8M0", **MX),
    "nvfp4 divides": Encoding(codes="e2m1", group_rows=1, group_columns=16, scale="E4M3", scale_of_scales="divides"),
    "nvfp4 multiplies": Encoding(
        codes="e2m1", group_rows=1, group_columns=16, scale="E4M3", scale_of_scales="multiplies"
    ),
    "fp8 blocks": Encoding(codes="e4m3", group_rows=128, group_columns=128, scale="F32"),
    "fp8 small blocks": Encoding(codes="e4m3", group_rows=16, group_columns=24, scale="BF16"),
    "fp8 rows": Encoding(codes="e4m3", group_rows=1, group_columns=0, scale="BF16", product="BF16"),
    "fp8 columns": Encoding(codes="e4m3", group_rows=0, group_columns=1, scale="F32"),
    "fp8 whole": Encoding(codes="e4m3", group_rows=0, group_columns=0, scale="F32"),
    "mxfp8": Encoding(codes="e4m3", scale="E8M0", **MX),
    "int4": Encoding(codes="offset4", scale="BF16", product="BF16", is_word_aligned=True, **MX),
    "int4 zeros": Encoding(codes="offset4", scale="BF16", product="BF16", zero="packed", is_word_aligned=True, **MX),
    "int4 float16": Encoding(codes="uint4", scale="F16", product="F16", zero="bytes", **MX),
    "int4 of 64": Encoding(codes="offset4", group_rows=1, group_columns=64, scale="F32"),
    "int4 of 128": Encoding(
        codes="uint4", group_rows=1, group_columns=128, scale="F16", product="F16", zero="packed", is_word_aligned=True
    ),
    "int8": Encoding(codes="int8", group_rows=1, group_columns=0, scale="F32"),
    "int8 of 127": Encoding(codes="int8", group_rows=1, group_columns=0, scale="F32", product="F127"),
    "int8 of 127 in groups": Encoding(codes="int8", scale="F32", product="F127", **MX),
    "int8 float zeros": Encoding(codes="uint8", scale="F16", product="F16", zero="floats", **MX),
    "int4 float zeros": Encoding(codes="uint4", scale="BF16", product="BF16", zero="floats", **MX),
    "int4 float16 zeros": Encoding(
        codes="uint4", group_rows=1, group_columns=64, scale="F16", product="F16", zero="floats"
    ),
    "int4 float32 zeros": Encoding(codes="offset4", scale="F32", product="F32", zero="floats", **MX),
    "int8 packed": Encoding(codes="offset8", scale="F16", product="F16", zero="packed", is_word_aligned=True, **MX),
    "nf4": Encoding(codes="nf4", group_rows=1, group_columns=64, scale="F32", is_high_first=True),
}


def random_parts(encoding, rows, columns, generator):
    """Every byte is possible: NaN, infinities and denormal numbers come up."""
    return {
        role: torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator)
        for role, nbytes in encoding.part_bytes(rows, columns).items()
    }


def expect_same_bits(found, expected):
    assert torch.equal(found.isnan(), expected.isnan())
    same = found.view(torch.int16) == expected.view(torch.int16)
    assert bool((same | expected.isnan()).all())


@pytest.mark.parametrize("name", ENCODINGS)
def test_c_agrees_with_the_definition_on_random_bytes(name):
    encoding, generator = ENCODINGS[name], torch.Generator().manual_seed(0)
    for rows, columns in SHAPES:
        parts = random_parts(encoding, rows, columns, generator)
        expected = decode(encoding, parts, rows, columns, torch.bfloat16)
        out = torch.zeros(rows, columns, dtype=torch.bfloat16)
        assert expand(encoding, parts, rows, columns, out, is_transposed=False)
        expect_same_bits(out, expected)
        turned = torch.zeros(columns, rows, dtype=torch.bfloat16)
        assert expand(encoding, parts, rows, columns, turned, is_transposed=True)
        expect_same_bits(turned, expected.t())


PAIRS = [
    (codes, scale)
    for codes in CODE_BITS
    if CODE_BITS[codes] in (4, 8)
    for scale in ITEM_BYTES
    if scale not in ("F64", "LDEXP")
]


@pytest.mark.parametrize(("codes", "scale"), [*PAIRS, ("e2m1", "LDEXP")])
def test_every_code_meets_every_leading_byte_of_a_scale(codes, scale):
    product = "F64" if scale == "LDEXP" else "F32"
    encoding = Encoding(codes=codes, group_rows=1, group_columns=0, scale=scale, product=product)
    columns, item = 1 << CODE_BITS[codes], ITEM_BYTES[scale]
    numbers = torch.arange(columns, dtype=torch.int32)
    packed = (numbers[::2] | numbers[1::2] << 4).to(torch.uint8) if columns == 16 else numbers.to(torch.uint8)
    top = torch.arange(256, dtype=torch.uint8).repeat_interleave(16 if item > 1 else 1)
    rows = len(top)
    scales = torch.zeros(rows, item, dtype=torch.uint8)
    scales[:, -1] = top
    if item > 1:
        scales[:, -2] = torch.arange(0, 256, 16, dtype=torch.uint8).repeat(256)
    parts = {"codes": packed.repeat(rows), "scales": scales.view(-1)}
    out = torch.zeros(rows, columns, dtype=torch.bfloat16)
    assert expand(encoding, parts, rows, columns, out, is_transposed=False)
    expect_same_bits(out, decode(encoding, parts, rows, columns, torch.bfloat16))


@pytest.fixture(scope="module")
def plain_c():
    """The expanders for a processor without AVX-512."""
    flags = ["-march=x86-64", "-ffp-contract=off"]
    function = compile_library([FOLDER / "expand.c"], headers=HEADERS, flags=flags).expertier_expand_stored
    function.argtypes = [ctypes.c_int, Parts, Parameters, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int]
    return function


@pytest.mark.parametrize("name", ENCODINGS)
def test_plain_c_agrees_with_the_definition(name, plain_c):
    encoding, (rows, columns) = ENCODINGS[name], (65, 200)
    parts = random_parts(encoding, rows, columns, torch.Generator().manual_seed(0))
    expected = decode(encoding, parts, rows, columns, torch.bfloat16)
    for is_transposed in (False, True):
        out = torch.zeros(*((columns, rows) if is_transposed else (rows, columns)), dtype=torch.bfloat16)
        matrix = kernel_matrix_of(encoding, rows, columns, parts)
        plain_c(matrix.form, Parts(*matrix.parts), matrix.parameter, rows, columns, out.data_ptr(), is_transposed)
        expect_same_bits(out.t() if is_transposed else out, expected)


@pytest.mark.parametrize("name", ENCODINGS)
def test_a_matrix_has_as_many_addresses_as_our_c_reads_or_is_refused(name):
    encoding, shape = ENCODINGS[name], (65, 200)
    parts = random_parts(encoding, *shape, torch.Generator().manual_seed(0))
    addresses = kernel_matrix_of(encoding, *shape, parts).parts
    assert len(addresses) == PARTS
    assert [address for address in addresses if address] == [parts[role].data_ptr() for role in ROLES if role in parts]
    for missing in parts:
        with pytest.raises(ValueError, match=f"needs its codes, scales.*; got (?!.*{missing})"):
            kernel_matrix_of(encoding, *shape, {role: part for role, part in parts.items() if role != missing})
    with pytest.raises(TypeError):
        KernelMatrix(PLAIN, *shape, None, *[0] * (PARTS + 1))
