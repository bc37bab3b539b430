"""The definition of every encoding against the format's owner: all codes, NaN ones too, and every exponent or scale."""

import pytest
import torch

from offload.codes.decode import decode
from offload.codes.encoding import Encoding
from offload.codes.hqq import HqqEncoding

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
ROWS = 256
MX = {"group_rows": 1, "group_columns": 32}
EXPONENT_R1 = torch.arange(ROWS, dtype=torch.uint8).view(ROWS, 1)
NIBBLES = torch.arange(16, dtype=torch.uint8) | torch.arange(15, -1, -1, dtype=torch.uint8) << 4
PAIRS = NIBBLES.repeat(ROWS, 1)
BYTES = torch.arange(256, dtype=torch.uint8).repeat(ROWS, 1)


def raw(tensor):
    return tensor.contiguous().view(torch.uint8).reshape(-1)


def expect_same_bits(found, expected):
    bits = {2: torch.int16, 4: torch.int32}[expected.element_size()]
    same = found.view(bits) == expected.contiguous().view(bits)
    assert bool((same | (found.isnan() & expected.isnan())).all())


def random_words(shape, generator):
    return torch.randint(-(1 << 31), 1 << 31, shape, dtype=torch.int64, generator=generator).int()


def scheme(**weights):
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    return QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mxfp4_of_gpt_oss(dtype):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    encoding = Encoding(codes="e2m1", scale="LDEXP", product="F64", **MX)
    found = decode(encoding, {"codes": raw(PAIRS), "scales": raw(EXPONENT_R1)}, ROWS, 32, dtype)
    owner = convert_moe_packed_tensors(PAIRS.view(1, ROWS, 1, 16), EXPONENT_R1.view(1, ROWS, 1), dtype=dtype)
    expect_same_bits(found, owner[0].t())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", ["EXP2", "E8M0"])
def test_fp4_and_mxfp8_of_transformers(scale, dtype):
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    owner = Fp8Dequantize(None)._dequantize_one
    exponent = EXPONENT_R1 if scale == "EXP2" else EXPONENT_R1.view(torch.float8_e8m0fnu)
    parts = {"codes": raw(PAIRS), "scales": raw(exponent)}
    found = decode(Encoding(codes="e2m1", scale=scale, **MX), parts, ROWS, 32, dtype)
    expect_same_bits(found, owner(PAIRS.view(torch.int8), exponent, dtype))
    exponents = exponent.view(torch.uint8).repeat(1, 8).view(exponent.dtype)
    parts = {"codes": raw(BYTES), "scales": raw(exponents)}
    found = decode(Encoding(codes="e4m3", scale=scale, **MX), parts, ROWS, 256, dtype)
    expect_same_bits(found, owner(BYTES.view(torch.float8_e4m3fn), exponents, dtype))


@pytest.mark.parametrize("scale", [torch.float32, torch.bfloat16], ids=str)
def test_fp8_blocks_of_transformers_with_scales_of_any_bits(scale):
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    generator = torch.Generator().manual_seed(0)
    scales = random_words((64, 4), generator).view(scale)[:, :4].contiguous()
    name = {torch.float32: "F32", torch.bfloat16: "BF16"}[scale]
    encoding = Encoding(codes="e4m3", group_rows=4, group_columns=64, scale=name)
    found = decode(encoding, {"codes": raw(BYTES), "scales": raw(scales)}, ROWS, 256, torch.bfloat16)
    owner = Fp8Dequantize(None)._dequantize_one(BYTES.view(torch.float8_e4m3fn), scales, torch.bfloat16)
    expect_same_bits(found, owner)


def test_mxfp4_and_mxfp8_of_compressed_tensors():
    compressors = pytest.importorskip("compressed_tensors.compressors")
    args = {"type": "float", "symmetric": True, "strategy": "group", "group_size": 32}
    encoding = Encoding(codes="e2m1", scale="EXP2", product="BF16", **MX)
    found = decode(encoding, {"codes": raw(PAIRS), "scales": raw(EXPONENT_R1)}, ROWS, 32, torch.bfloat16)
    state = {"weight_packed": PAIRS, "weight_scale": EXPONENT_R1}
    owner = compressors.MXFP4PackedCompressor.decompress(state, scheme(num_bits=4, **args))
    expect_same_bits(found, owner["weight"])
    exponents = EXPONENT_R1.repeat(1, 8)
    encoding = Encoding(codes="e4m3", scale="EXP2", product="BF16", **MX)
    found = decode(encoding, {"codes": raw(BYTES), "scales": raw(exponents)}, ROWS, 256, torch.bfloat16)
    state = {"weight": BYTES.view(torch.float8_e4m3fn), "weight_scale": exponents}
    owner = compressors.MXFP8QuantizationCompressor.decompress(
        state, scheme(num_bits=8, scale_dtype=torch.uint8, **args)
    )
    expect_same_bits(found, owner["weight"].bfloat16())


@pytest.mark.parametrize("common", [1234.5, 1e-38, 1e38, 3e-40, 0.0])
def test_nvfp4_of_compressed_tensors(common):
    compressors = pytest.importorskip("compressed_tensors.compressors")
    codes = torch.randint(0, 256, (ROWS, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    scales, divisor = EXPONENT_R1.repeat(1, 16), torch.tensor([common])
    encoding = Encoding(codes="e2m1", group_rows=1, group_columns=16, scale="E4M3", scale_of_scales="divides")
    parts = {"codes": raw(codes), "scales": raw(scales), "global": raw(divisor)}
    found = decode(encoding, parts, ROWS, 256, torch.bfloat16)
    state = {"weight_packed": codes, "weight_scale": scales.view(torch.float8_e4m3fn), "weight_global_scale": divisor}
    args = {"type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": 16}
    owner = compressors.NVFP4PackedCompressor.decompress(state, scheme(num_bits=4, **args))
    expect_same_bits(found, owner["weight"])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("scale", DTYPES, ids=str)
def test_packed_integers_of_compressed_tensors(scale, bits):
    compressors = pytest.importorskip("compressed_tensors.compressors")
    generator, name = torch.Generator().manual_seed(0), {"b": "BF16", "f": "F"}[str(scale)[6]]
    name = name if name == "BF16" else f"F{8 * scale.itemsize}"
    scales = random_words((ROWS, 8), generator).view(scale)[:, :8].contiguous()
    zeros = random_words((ROWS * bits // 32, 8), generator)
    codes = random_words((ROWS, 256 * bits // 32), generator)
    kind = {"codes": f"offset{bits}", "scale": name, "product": name, "zero": "packed", "is_word_aligned": True}
    parts = {"codes": raw(codes), "scales": raw(scales), "zeros": raw(zeros)}
    found = decode(Encoding(**kind, **MX), parts, ROWS, 256, torch.bfloat16)
    state = {"weight_packed": codes, "weight_scale": scales, "weight_zero_point": zeros}
    state["weight_shape"] = torch.tensor([ROWS, 256])
    args = {"type": "int", "symmetric": False, "strategy": "group", "group_size": 32}
    owner = compressors.PackedQuantizationCompressor.decompress(state, scheme(num_bits=bits, **args))
    expect_same_bits(found, owner["weight"].bfloat16())


def test_one_bit_codes_of_hqq_by_hand():
    """Eight lines of two weights share two bytes, the first line in the highest bits."""
    encoding = HqqEncoding(packing="1bit_u8", group=2, axis=1, scale="F32")
    codes = torch.tensor([0b10110010, 0b01010101], dtype=torch.uint8)
    scale, zero = torch.arange(1.0, 9.0), torch.tensor([0.5, 0.5, 0.25, 0.0, 1.0, 0.5, 0.5, -1.0])
    parts = {"codes": codes, "scales": raw(scale), "zeros": raw(zero)}
    by_hand = torch.tensor(
        [
            *(0.5, -0.5, -1.0, 1.0, 2.25, -0.75, 4.0, 4.0),
            *(-5.0, -5.0, -3.0, 3.0, 3.5, -3.5, 8.0, 16.0),
        ]
    ).view(2, 8)
    assert encoding.part_bytes(2, 8) == {"codes": 2, "scales": 32, "zeros": 32}
    assert torch.equal(encoding.decode(parts, 2, 8, torch.float32), by_hand)
    as_rows = encoding.turn(parts, 2, 8)
    assert as_rows["codes"].tolist() == [0b11011001, 0b10011000], "the first weight in the lowest bit"
    assert torch.equal(decode(encoding.packed, as_rows, 2, 8, torch.float32), by_hand)
    down = HqqEncoding(packing="1bit_u8", group=8, axis=0, scale="F32")
    parts |= {"scales": raw(torch.tensor([2.0, 4.0])), "zeros": raw(torch.tensor([0.5, 0.25]))}
    by_line = [1.0, -1.0, -1.0, 3.0, 1.0, -1.0, 1.0, 3.0, -1.0, -1.0, -1.0, 3.0, 1.0, -1.0, -1.0, 3.0]
    assert torch.equal(down.decode(parts, 2, 8, torch.float32), torch.tensor(by_line).view(2, 8))
