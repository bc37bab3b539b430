"""Damaged quantised checkpoints are refused by the tensor's name; leftovers that models do not use are not."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DeepseekV3Config

import offload
from offload.checkpoint.model_folder import read_config, read_weights
from offload.runtime.opening import open_headers
from tests.quantised_checkpoints import logits_of, write_plain, write_tensors
from tests.quantised_formats import FORMATS, fp8_blocks, packed_integers
from tests.test_offload_formats_quantised import TOKENS, config_of, is_quantised, make_folders, quantise
from tests.test_offload_runtime_families_composite import _save as save_composite

EXPERT = "model.layers.1.mlp.experts.3.up_proj"
DENSE = "model.layers.0.self_attn.k_proj"


@pytest.fixture
def fp8(tmp_path):
    return make_folders(tmp_path, "fp8 blocks F32", num_shards=1)[0]


def change(folder, edit):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def expect_refused(folder, message):
    for call in (lambda: offload.load(folder, cache_experts=2), lambda: offload.write_pack(folder, folder / "pack")):
        with pytest.raises(ValueError, match=message) as refused:
            call()
        assert len(str(refused.value).splitlines()) == 1
        assert not list(folder.glob("pack*"))


@pytest.mark.parametrize("name", [EXPERT, DENSE])
def test_a_missing_scale(fp8, name):
    change(fp8, lambda tensors: tensors.pop(f"{name}.weight_scale_inv"))
    expect_refused(fp8, rf"{name}\.weight F8_E4M3 .* has no {name}\.weight_scale beside it")


@pytest.mark.parametrize("name", [EXPERT, DENSE])
def test_missing_codes(fp8, name):
    change(fp8, lambda tensors: tensors.pop(f"{name}.weight"))
    expect_refused(fp8, rf"{name}\.weight|mlp\.experts\.gate_up_proj needs 5 experts")


@pytest.mark.parametrize("name", [EXPERT, DENSE])
def test_a_scale_with_a_row_too_few(fp8, name):
    def cut(tensors):
        key = f"{name}.weight_scale_inv"
        tensors[key] = tensors[key][:, :1].clone() if name == DENSE else tensors[key][:2].clone()

    change(fp8, cut)
    expect_refused(fp8, rf"{name}\.weight_scale_inv F32 .*: no scale for each block \(40x40\)")


def test_swapped_companions(fp8):
    def swap(tensors):
        up, down = EXPERT, EXPERT.replace("up_proj", "down_proj")
        keys = f"{up}.weight_scale_inv", f"{down}.weight_scale_inv"
        tensors[keys[0]], tensors[keys[1]] = tensors[keys[1]], tensors[keys[0]]

    change(fp8, swap)
    expect_refused(fp8, r"(up|down)_proj\.weight_scale_inv F32 .*: no scale for each block")


def test_a_surplus_companion(fp8):
    change(fp8, lambda tensors: tensors.update({f"{DENSE}.weight_scale_2": torch.ones(())}))
    expect_refused(fp8, rf"{DENSE}\.weight_scale_2 F32 \[\] stands beside a tensor that is read without it")


def test_a_companion_beside_plain_weights(fp8):
    change(fp8, lambda tensors: tensors.update({"lm_head.weight_scale_inv": torch.ones(2, 2)}))
    expect_refused(fp8, r"lm_head\.weight_scale_inv F32 .* stands beside a tensor that is read without it")


def test_integers_in_place_of_scales(fp8):
    def count(tensors):
        key = f"{EXPERT}.weight_scale_inv"
        tensors[key] = tensors[key].int()

    change(fp8, count)
    expect_refused(fp8, rf"{EXPERT}\.weight_scale_inv I32 .*: scales of this dtype are not known")


def test_experts_of_one_layer_that_are_stored_differently(fp8):
    change(fp8, lambda tensors: tensors.update({f"{EXPERT}.weight": torch.ones(96, 64).bfloat16()}))
    change(fp8, lambda tensors: tensors.pop(f"{EXPERT}.weight_scale_inv"))
    expect_refused(fp8, r"the experts' tensors .* differ in shape, dtype or stored form")


def test_a_shape_that_is_not_that_of_the_codes(tmp_path):
    pytest.importorskip("compressed_tensors")
    folder, _ = make_folders(tmp_path, "int4", num_shards=1)
    change(folder, lambda tensors: tensors.update({f"{EXPERT}.weight_shape": torch.tensor([96, 128])}))
    expect_refused(folder, rf"{EXPERT}\.weight_packed I32 .*: not \[96, 128\] in codes of 2, 3, 4 or 8 bits")


def test_missing_companions_of_packed_weights(tmp_path):
    pytest.importorskip("compressed_tensors")
    folder, _ = make_folders(tmp_path, "nvfp4 packed", num_shards=1)
    whole = load_file(folder / "model.safetensors")
    change(folder, lambda tensors: tensors.pop(f"{EXPERT}.weight_global_scale"))
    expect_refused(folder, rf"{EXPERT}\.weight_packed .*: scales of F8_E4M3 need a scale of scales")
    save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})
    change(folder, lambda tensors: tensors.pop(f"{EXPERT}.weight_scale"))
    expect_refused(folder, rf"{EXPERT}\.weight_packed .* has no {EXPERT}\.weight_scale beside it")


def test_experts_of_which_one_is_sorted_by_activation(tmp_path):
    pytest.importorskip("compressed_tensors")
    folder, _ = make_folders(tmp_path, "int4", num_shards=1)
    order = {f"{EXPERT}.weight_g_idx": torch.arange(64).flip(0).int() // 32}
    change(folder, lambda tensors: tensors.update(order))
    expect_refused(folder, r"the experts' tensors .* differ in shape, dtype or stored form")


def test_columns_that_name_a_group_that_is_not_there(tmp_path):
    folder, _ = make_folders(tmp_path, "gptq sorted", num_shards=1)
    change(folder, lambda tensors: tensors[f"{EXPERT}.g_idx"].fill_(2))
    with pytest.raises(ValueError, match="columns name groups from 2 to 2; there are 2"):
        offload.write_pack(folder, folder / "pack")
    change(folder, lambda tensors: tensors[f"{DENSE}.g_idx"].fill_(2))
    with pytest.raises(ValueError, match="columns name groups from 2 to 2; there are 2"):
        offload.load(folder, cache_experts=2)


def _text(text):
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


DAMAGES = {
    "int8 bitsandbytes": [
        ("SCB", None, rf"{EXPERT}\.weight is stored as I8"),
        ("SCB", torch.ones(95), rf"{EXPERT}\.SCB F32 \[95\]: expected \[96\]"),
        ("SCB", torch.ones(96).bfloat16(), rf"{EXPERT}\.SCB BF16 \[96\]: scales of this dtype"),
        (
            "weight_format",
            torch.tensor(2, dtype=torch.uint8),
            r"weight_format: names the order of weights 2",
        ),
        ("weight_scale_2", torch.ones(1), rf"{EXPERT}\.weight_scale_2 F32 \[1\] stands beside"),
        ("weight", None, r"needs 5 experts"),
    ],
    "hqq": [
        ("zero", None, rf"{EXPERT}\.W_q U8 .* has no {EXPERT}\.zero beside it"),
        ("packing", None, rf"has no {EXPERT}\.packing beside it"),
        ("packing", _text("4bit_32"), rf"{EXPERT}\.packing: names the packing '4bit_32'"),
        ("packing", _text("1bit_u8"), rf"{EXPERT}\.W_q U8 .*: has 3072 bytes, .* needs 768"),
        ("packing", _text("8bit_u8"), rf"{EXPERT}\.W_q U8 .*: has 3072 bytes, .* needs 6144"),
        ("group_size", torch.tensor(37), rf"{EXPERT}\.W_q: groups of 37 along axis 1 are no division of \[96, 64\]"),
        ("scale", torch.ones(96, 1).bfloat16(), rf"{EXPERT}\.scale BF16 \[96, 1\]: expected \[192, 1\]"),
        ("zero", torch.ones(192, 1), rf"{EXPERT}\.zero F32 .*: expected the dtype of {EXPERT}\.scale BF16"),
        ("compute_dtype", _text("torch.float16"), r"and of products \(torch\.float16\)"),
        ("shape", torch.tensor([64, 96, 1]), rf"{EXPERT}\.W_q: groups of 32 along axis 1 are no division"),
        ("W_q", None, rf"{EXPERT}\.|needs 5 experts"),
    ],
}


@pytest.mark.parametrize("format_name", DAMAGES)
def test_damages_of_a_format(format_name, tmp_path):
    folder, _ = make_folders(tmp_path, format_name, num_shards=1)
    whole = load_file(folder / "model.safetensors")
    for name, tensor, message in DAMAGES[format_name]:
        damaged = {key: value for key, value in whole.items() if key != f"{EXPERT}.{name}"}
        damaged |= {} if tensor is None else {f"{EXPERT}.{name}": tensor}
        save_file(damaged, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=message) as refused:
            open_headers(folder, None)
        assert len(str(refused.value).splitlines()) == 1


def test_a_file_that_ends_early(fp8):
    file = fp8 / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    expect_refused(fp8, r"model\.safetensors: truncated")


def test_scales_of_activations_and_caches_are_not_missed(fp8, tmp_path):
    extra = {f"{DENSE}.{name}": torch.ones(()) for name in ("input_scale", "k_scale", "activation_scale")}
    change(fp8, lambda tensors: tensors.update(extra))
    resident = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype="auto")
    model = offload.load(fp8, cache_experts=2)
    assert torch.equal(logits_of(model, TOKENS), logits_of(resident, TOKENS))


def test_a_layer_for_the_next_token_but_one_is_left_alone(fp8, tmp_path):
    def append(tensors):
        for name in list(tensors):
            if name.startswith("model.layers.1."):
                tensors[name.replace("layers.1.", "layers.2.")] = tensors[name].clone()
        tensors["model.layers.2.eh_proj.weight"] = torch.ones(64, 128).bfloat16()
        tensors["model.layers.2.mlp.shared.weight_scale_inv"] = torch.ones(1)

    change(fp8, append)
    resident = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype="auto")
    assert torch.equal(logits_of(offload.load(fp8, cache_experts=2), TOKENS), logits_of(resident, TOKENS))


def test_layers_and_matrices_of_different_forms(tmp_path):
    """Layer 0: FP8 experts with int4 down projections; layer 1: plain gate, quantised up, plain down."""
    pytest.importorskip("compressed_tensors")
    plain = write_plain(config_of(), tmp_path / "plain")
    stored, generator = dict(write_plain(config_of(), tmp_path / "mixed")), torch.Generator().manual_seed(1)
    for name in filter(is_quantised, list(plain)):
        if "layers.1." in name and "up_proj" not in name:
            continue
        write = packed_integers if name.endswith("down_proj.weight") else fp8_blocks
        plain[name] = quantise(stored, name, write, generator)
    write_tensors(tmp_path / "plain", plain)
    write_tensors(tmp_path / "mixed", stored, quantization_config=FORMATS["fp8 blocks F32"][1], num_shards=3)
    resident = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype="auto")
    pack = offload.write_pack(tmp_path / "mixed", tmp_path / "experts")
    for packed in (None, pack):
        model = offload.load(tmp_path / "mixed", cache_experts=2, pack=packed)
        assert [layer.form.name for layer in model.offload._runtime.layers] == ["mixed", "fp8"]
        assert torch.equal(logits_of(model, TOKENS), logits_of(resident, TOKENS))


@pytest.mark.parametrize("place", ["hf_quant_config.json", "nowhere"])
def test_wherever_the_quantisation_is_described(tmp_path, place):
    """In ModelOpt's own file, or not at all: companions decide."""
    folder, _ = make_folders(tmp_path, "fp8 whole")
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    if place != "nowhere":
        quantization = {"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}}
        (folder / place).write_text(json.dumps(quantization))
    resident = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype="auto")
    assert torch.equal(logits_of(offload.load(folder, cache_experts=2), TOKENS), logits_of(resident, TOKENS))


def test_scales_do_not_decide_the_dtype_of_a_model(fp8):
    config = json.loads((fp8 / "config.json").read_text())
    del config["dtype"]
    (fp8 / "config.json").write_text(json.dumps(config))
    change(fp8, lambda tensors: tensors.update({"a.weight_scale": torch.ones(1)}))
    _, dtype = read_weights(fp8, read_config(fp8), "auto")
    assert dtype == torch.bfloat16


def test_fused_experts_of_a_composite_model(tmp_path):
    """The description stands in `text_config`; experts are one tensor for each layer, with scales for each expert."""
    reader = save_composite("gemma4", tmp_path / "plain")
    save_composite("gemma4", tmp_path / "fp8")
    plain, generator = load_file(tmp_path / "plain" / "model.safetensors"), torch.Generator().manual_seed(1)
    stored = dict(plain)
    for name in [name for name in plain if name.endswith((".gate_up_proj", ".down_proj"))]:
        parts = [fp8_blocks(matrix.float(), generator, block=(32, 32)) for matrix in stored.pop(name)]
        stored[name] = torch.stack([part["weight"].view(torch.uint8) for part, _ in parts]).view(torch.float8_e4m3fn)
        stored[f"{name}_scale_inv"] = torch.stack([part["weight_scale_inv"] for part, _ in parts])
        plain[name] = torch.stack([matrix for _, matrix in parts])
    assert len(stored) > len(plain)
    write_tensors(tmp_path / "plain", plain)
    described = {"quant_method": "fp8", "weight_block_size": [32, 32]}
    write_tensors(tmp_path / "fp8", stored, quantization_config=described, place="text_config")
    resident = reader.from_pretrained(tmp_path / "plain", dtype="auto")
    pack = offload.write_pack(tmp_path / "fp8", tmp_path / "experts")
    for packed in (None, pack):
        model = offload.load(tmp_path / "fp8", cache_experts=2, pack=packed)
        assert {layer.form.name for layer in model.offload._runtime.layers} == {"fp8"}
        assert torch.equal(logits_of(model, TOKENS), logits_of(resident, TOKENS))


def test_rows_that_blocks_do_not_divide(tmp_path):
    """DeepSeek-V3's dense projection of 576 rows and experts of 1408 and 2880: every last block of 128 is cut."""
    sizes = {"vocab_size": 64, "hidden_size": 96, "moe_intermediate_size": 1408, "intermediate_size": 2880}
    latent = {"q_lora_rank": 32, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 16, "v_head_dim": 16}
    experts = {"n_routed_experts": 10, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1, "n_shared_experts": 1}
    depth = {"num_hidden_layers": 2, "first_k_dense_replace": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = DeepseekV3Config(**sizes, **latent, **experts, **depth, eos_token_id=None, pad_token_id=0)
    plain = write_plain(config, tmp_path / "plain")
    stored, generator = dict(write_plain(config, tmp_path / "fp8")), torch.Generator().manual_seed(1)
    for name in list(plain):
        if name.endswith(("proj.weight", "kv_a_proj_with_mqa.weight")):
            plain[name] = quantise(
                stored, name, lambda weight, given: fp8_blocks(weight, given, block=(128, 128)), generator
            )
    write_tensors(tmp_path / "plain", plain)
    described = {"quant_method": "fp8", "weight_block_size": [128, 128], "scale_fmt": "ue8m0"}
    write_tensors(tmp_path / "fp8", stored, quantization_config=described)
    assert stored["model.layers.0.self_attn.kv_a_proj_with_mqa.weight_scale_inv"].shape == (5, 1)
    resident = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype="auto")
    for io in ("cached", "direct"):
        model = offload.load(tmp_path / "fp8", cache_experts=3, io=io)
        assert torch.equal(logits_of(model, TOKENS), logits_of(resident, TOKENS))
        model.offload.close()


def _keep_head(file):
    """What `fit` has of a model on the hub: the head, and a hole of the size of the rest."""
    size, data = file.stat().st_size, file.read_bytes()
    file.write_bytes(data[: 8 + int.from_bytes(data[:8], "little")])
    with file.open("r+b") as stream:
        stream.truncate(size)


def test_shapes_that_are_values_are_told_by_the_codes_where_only_heads_are_here(tmp_path):
    pytest.importorskip("compressed_tensors")
    folder, _ = make_folders(tmp_path, "int4", num_shards=1)
    whole = open_headers(folder, None)
    _keep_head(folder / "model.safetensors")
    found = open_headers(folder, None)
    assert [form.expert_bytes for form in found.forms] == [form.expert_bytes for form in whole.forms]


def test_what_heads_cannot_tell_is_said(tmp_path):
    folder, _ = make_folders(tmp_path, "hqq", num_shards=1)
    _keep_head(folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"\.packing: says how a matrix lies, and only the head of its file is here"):
        open_headers(folder, None)
