"""Schemes: what is stored decodes to code times scale, by our definition, by C and by the owners of the formats."""

import pytest
import torch

from offload.codes.bits import pack_bits
from offload.codes.schemes import FORMS, Scheme
from offload.lowbit.methods.rounding import hqq, rtn

BF16 = torch.bfloat16


def matrix(rows=48, columns=128, seed=0):
    w_RC = 0.02 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    w_RC[3, 5], w_RC[7] = 0.3, 0.0
    return w_RC


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("columns", [128, 80])
def test_stored_parts_decode_to_what_was_rounded(form, columns):
    if form == "mxfp4" and columns % 32:
        pytest.skip("groups of 32")
    scheme = Scheme.for_columns(form, columns, 64)
    found = rtn(matrix(columns=columns), scheme, "BF16")
    stored, out = found.stored, torch.empty(48, columns, dtype=BF16)
    stored.expand(out)
    assert torch.equal(out, found.weight_RC.to(BF16))
    assert {role: part.numel() for role, part in stored.parts.items()} == stored.encoding.part_bytes(48, columns)
    assert Scheme.named(scheme.name) == scheme


@pytest.mark.parametrize("form", ["int8", "int4", "int3", "int2"])
def test_zeros_are_stored_and_subtracted(form):
    scheme = Scheme(form, 32, has_zero=True)
    found, out = hqq(matrix(), scheme, "BF16"), torch.empty(48, 128, dtype=BF16)
    found.stored.expand(out)
    assert torch.equal(out, found.weight_RC.to(BF16))
    assert Scheme.named(scheme.name) == scheme


@pytest.mark.parametrize("form", ["int8", "int4", "int3", "int2", "mxfp4"])
def test_compressed_tensors_decodes_the_same(form):
    quantization = pytest.importorskip("compressed_tensors.quantization")
    from compressed_tensors.compressors import MXFP4PackedCompressor, PackedQuantizationCompressor

    scheme = Scheme.for_columns(form, 128, 64)
    found = rtn(matrix(), scheme, "BF16")
    parts, encoding = found.stored.parts, found.stored.encoding
    kind = {"num_bits": scheme.bits, "type": "int" if scheme.is_integer else "float", "symmetric": True}
    weights = quantization.QuantizationArgs(**kind, strategy="group", group_size=scheme.group)
    owner_scheme = quantization.QuantizationScheme(targets=["Linear"], weights=weights)
    scales = parts["scales"].view(48, -1)
    if scheme.is_integer:
        state = {
            "weight_packed": parts["codes"].view(torch.int32).view(48, -1),
            "weight_shape": torch.tensor([48, 128]),
        }
        owner, state["weight_scale"] = PackedQuantizationCompressor, scales.view(BF16)
    else:
        owner, state = MXFP4PackedCompressor, {"weight_packed": parts["codes"].view(48, -1), "weight_scale": scales}
    assert encoding.zero == "none"
    assert torch.equal(owner.decompress(state, owner_scheme)["weight"].to(BF16), found.weight_RC.to(BF16))


def test_three_bits_by_hand():
    """Each code takes the next three bits of one little-endian number."""
    code_RC = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 0]], dtype=torch.uint8)
    number = sum(int(code) << 3 * place for place, code in enumerate(code_RC[0]))
    assert bytes(pack_bits(code_RC, 3, 4)[0].tolist()) == number.to_bytes(4, "little")


def test_the_farthest_weight_gets_the_code_below_zero_that_has_no_partner():
    w_RC = torch.tensor([[0.8, -0.1, 0.3, 0.0] * 4])
    found = rtn(w_RC, Scheme("int4", 16), "F32")
    assert found.scale_RG.item() == pytest.approx(-0.1)
    assert found.number_RC[0, :4].tolist() == [-8, 1, -3, 0]


def test_e2m1_rounds_ties_to_even_codes():
    scheme = Scheme.named("mxfp4")
    value = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 9.0, -0.25])
    assert scheme.numbers(value, torch.tensor(1.0)).tolist() == [0, 1, 1, 2, 2, 4, 4, 6, -0.0]


@pytest.mark.parametrize("name", ["int5-64", "int4-", "fp8z", "mxfp4z", "", "int4-64 "])
def test_names_of_nothing(name):
    with pytest.raises(ValueError, match="names no scheme"):
        Scheme.named(name)


def test_groups_are_halved_until_they_divide():
    assert [Scheme.for_columns("int4", columns, 64).group for columns in (128, 96, 80, 72, 40)] == [64, 32, 16, 0, 0]
    with pytest.raises(ValueError, match="multiple of 32"):
        Scheme.for_columns("mxfp4", 80, 64)
