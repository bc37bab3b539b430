"""Compressed weights: every bit comes back, by torch, by C, and in products; forged or damaged records are refused."""

import json

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, OlmoeConfig
from xxhash import xxh3_64_hexdigest

import offload
from offload.compute import norms
from offload.compute.orders import orders
from offload.forecast.fit import fit
from offload.formats import compression
from offload.formats.compression import CompressedMatrix, CompressedShape, can_compress, compress, expand
from offload.formats.pack_index import PackIndex
from offload.native import library as native
from offload.native.kernel_matrix import plain_matrix
from offload.store import packing

SIZES = {
    "vocab_size": 64, "hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "num_experts": 6, "num_experts_per_tok": 2, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip

KINDS = ["bits", "normal", "zero", "few", "mixed"]


def _bits(tensor):
    return tensor.view(torch.int16)


def _record(weight):
    guard = torch.zeros(compression.GUARD_BYTES, dtype=torch.uint8)
    return torch.cat([*compress(weight), guard])


def _expansions(record, shape):
    plainly, by_c = (torch.empty(shape, dtype=torch.bfloat16) for _ in range(2))
    compression._expand_plainly(record, plainly)
    expand(record, by_c)
    return plainly, by_c


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(0, 2**31),
    st.sampled_from(["bits", "normal", "zero", "few", "mixed"]),
)
def test_every_bit_comes_back(blocks, segments, seed, kind):
    generator = torch.Generator().manual_seed(seed)
    shape = (32 * blocks, 64 * segments)
    bits = torch.randint(-(2**15), 2**15, shape, generator=generator, dtype=torch.int16)
    normal = torch.randn(shape, generator=generator).bfloat16()
    weight = {
        "bits": bits.view(torch.bfloat16),
        "normal": normal,
        "zero": torch.zeros_like(normal),
        "few": normal.sign() * 2.0 ** torch.randint(-3, 4, shape, generator=generator),
        "mixed": torch.where(torch.rand(shape, generator=generator) < 0.02, bits.view(torch.bfloat16), normal),
    }[kind].bfloat16()
    plainly = compression._compress_plainly(weight, CompressedShape(*shape), CompressedShape(*shape).others_at)
    for record in (_record(weight), torch.cat([*plainly, torch.zeros(compression.GUARD_BYTES, dtype=torch.uint8)])):
        for found in _expansions(record, shape):
            assert torch.equal(_bits(found), _bits(weight))


def test_layout_of_a_hand_made_block():
    weight = torch.ones(32, 64, dtype=torch.bfloat16)
    weight[0, 1], weight[0, 33], weight[31, 63] = -1.5, 2.0, float("inf")
    whole, others = compress(weight)
    shape = CompressedShape(32, 64)
    assert (shape.segments_at, shape.others_at, len(whole)) == (64, 64 + 32 * 88, 64 + 32 * 88)
    assert set(whole[:2].tolist()) == {127, 128}
    assert whole[7] == 255
    assert int.from_bytes(bytes(whole[8:12].tolist()), "little") == shape.others_at
    assert others.tolist() == [255]
    rest = whole[64 : 64 + 2048].view(32, 64)
    assert (rest[0, 1], rest[0, 9], rest[31, 63]) == (0x80 | 0x40, 0, 0)
    code = whole[64 + 2048 :].view(32, 24)
    code_of_two = whole[:7].tolist().index(128)
    assert code[0, 3:6].tolist() == [code_of_two << 3, 0, 0]
    assert code[31, 21:].tolist() == [0, 0, 7 << 5]


def test_normal_weights_need_about_eleven_bits():
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    whole, others = compress(weight)
    assert 16 * (len(whole) + len(others)) / weight.nbytes < 11.4


@pytest.mark.parametrize(
    ("shape", "dtype", "expected"),
    [
        ((64, 128), torch.bfloat16, True),
        ((64, 128), torch.float16, False),
        ((48, 128), torch.bfloat16, False),
        ((64, 96), torch.bfloat16, False),
        ((2, 64, 128), torch.bfloat16, False),
    ],
)
def test_what_can_be_compressed(shape, dtype, expected):
    assert can_compress(shape, dtype) is expected


@pytest.mark.parametrize("order", orders(), ids=lambda order: order.name)
@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("shape", [(64, 128), (192, 64), (1344, 256)])
def test_products_have_the_bits_of_the_plain_matrix(order, rows, shape):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator).bfloat16()
    x = torch.randn(rows, shape[1], generator=generator).bfloat16()
    plain, found = torch.empty(rows, shape[0]).bfloat16(), torch.empty(rows, shape[0]).bfloat16()
    stored = _record(weight)
    order.multiply(x, (plain_matrix(weight),), (plain,))
    order.multiply(x, (CompressedMatrix().kernel_matrix(stored, shape),), (found,))
    assert plain.float().abs().sum() > 0
    assert torch.equal(plain, found)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    folder = tmp_path_factory.mktemp("compressed") / "model"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(OlmoeConfig(**SIZES, dtype="bfloat16")).bfloat16()
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pack(folder):
    return packing.write_pack(folder, folder.parent / "experts", is_compressed=True)


def _run(model):
    """Prefill, two sequences at once, and tokens one by one."""
    tokens = torch.randint(0, 64, (1, 19), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        output = model(tokens[:, :9], use_cache=True)
        logits = [output.logits[0, -1]]
        for place in range(9, 19):
            output = model(tokens[:, place : place + 1], past_key_values=output.past_key_values, use_cache=True)
            logits.append(output.logits[0, -1])
        logits.extend(model(tokens[:, :18].view(2, 9)).logits[:, -1])
    return torch.stack(logits)


@pytest.mark.parametrize("cache_experts", [1, 2, 4, 6])
@pytest.mark.parametrize("io", ["cached", "direct"])
def test_a_model_has_the_same_bits(folder, pack, cache_experts, io):
    expected = _run(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval())
    model = offload.load(folder, cache_experts=cache_experts, pack=pack, io=io)
    assert all(slots.form.name == "compressed" for slots in model.offload._runtime.layers)
    assert torch.equal(_run(model), expected)
    model.offload.close()


@pytest.fixture
def no_compiler(monkeypatch):
    """As on a machine without a C compiler, also for what was compiled before."""

    def none():
        raise OSError("no compiler")

    caches = compression._compress, compression._expand, norms._sum, norms._rms_norm, norms._sums_like_torch
    for cache in caches:
        cache.cache_clear()
    monkeypatch.setattr(native, "library", none)
    monkeypatch.setattr("offload.compute.matvec.orders", none)
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.mark.usefixtures("no_compiler")
def test_a_model_has_the_same_bits_without_our_c(folder, pack):
    expected = _run(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval())
    assert torch.equal(_run(offload.load(folder, cache_experts=2, pack=pack)), expected)


def test_more_experts_fit_the_same_memory(folder, pack):
    plain, compressed = (fit(folder, cpu_memory="16GiB", pack=file) for file in (None, pack))
    assert compressed.expert_bytes < 0.72 * plain.expert_bytes
    assert compressed.forms[0].slot_bytes < 0.8 * plain.forms[0].slot_bytes
    assert compressed.needs.staging_bytes - plain.needs.staging_bytes == compressed.forms[0].layer.plain_bytes


def test_layers_that_cannot_be_compressed_stay_plain(tmp_path):
    config = OlmoeConfig(**SIZES | {"intermediate_size": 48}, dtype="bfloat16")
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(tmp_path / "model")
    file = packing.write_pack(tmp_path / "model", tmp_path / "experts", is_compressed=True)
    assert {layer.encoding for layer in PackIndex.read(tmp_path / "experts.json").layers} == {"plain"}
    tokens = torch.arange(9)[None]
    expected = offload.load(tmp_path / "model", cache_experts=3)(tokens).logits
    assert torch.equal(offload.load(tmp_path / "model", cache_experts=3, pack=file)(tokens).logits, expected)


def test_weights_that_would_grow_stay_plain(tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(OlmoeConfig(**SIZES, dtype="bfloat16")).bfloat16()
    for name, parameter in model.named_parameters():
        if "experts" in name:
            bits = torch.randint(-(2**15), 2**15, parameter.shape, dtype=torch.int16)
            parameter.data = bits.view(torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    packing.write_pack(tmp_path / "model", tmp_path / "experts", is_compressed=True)
    assert {layer.encoding for layer in PackIndex.read(tmp_path / "experts.json").layers} == {"plain"}


def test_forged_heads_are_refused(folder, pack, tmp_path):
    """A checksum is no protection against intent: heads that point outside the record are an error, not a crash."""
    index = json.loads(pack.with_name("experts.json").read_text())
    data = bytearray(pack.read_bytes())
    for record in index["layers"][0]["records"]:
        start = record["offset"]
        data[start + 8 : start + 12] = (0xFFFFFFF0).to_bytes(4, "little")
        record["xxh3"] = xxh3_64_hexdigest(bytes(data[start : start + record["nbytes"]]))
    forged = tmp_path / "experts"
    forged.write_bytes(data)
    forged.with_name("experts.json").write_text(json.dumps(index))
    with pytest.raises(OSError, match="points to byte"):
        offload.load(folder, cache_experts=2, pack=forged)(torch.arange(5)[None])


@pytest.mark.parametrize(
    ("place", "change", "message"),
    [
        (0, {"offset": 100}, "the index is damaged"),
        (0, {"nbytes": 64}, "the index is damaged"),
        (0, {"offset": 1 << 40}, "the index is damaged"),
        (-1, {"offset": 1 << 40}, "instead of"),
        (0, {"nbytes": -1}, "not the index of a packed copy"),
    ],
)
def test_forged_indices_are_refused(folder, pack, tmp_path, place, change, message):
    index = json.loads(pack.with_name("experts.json").read_text())
    index["layers"][place]["records"][place] |= change
    forged = tmp_path / "experts"
    forged.write_bytes(pack.read_bytes())
    forged.with_name("experts.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=message):
        offload.load(folder, cache_experts=2, pack=forged)


def test_a_compressed_pack_goes_on_only_as_a_compressed_one(folder, tmp_path):
    def stop_in_the_second_layer(done, total):
        if done > 0.6 * total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        packing.write_pack(folder, tmp_path / "experts", progress=stop_in_the_second_layer)
    packing.write_pack(folder, tmp_path / "experts", is_compressed=True)
    assert {layer.encoding for layer in PackIndex.read(tmp_path / "experts.json").layers} == {"compressed"}
    model = offload.load(folder, cache_experts=2, pack=tmp_path / "experts")
    assert torch.isfinite(model(torch.arange(5)[None]).logits).all()


def test_a_gpu_refuses_compressed_experts(folder, pack):
    with pytest.raises(ValueError, match="pack without --compress"):
        fit(folder, gpu_memory="8GiB", pack=pack)
