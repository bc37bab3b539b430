"""Experts of every quantised form: weights equal the owner's dequantisation, offloaded logits the resident model's.

The model is Qwen3-MoE, whose experts stand one by one in a checkpoint, with attention quantised as well.
"""

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

import offload
from offload.checkpoint.model_folder import read_config, read_weights
from offload.checkpoint.quantised.entry import QuantisedEntry, lazy_tensor
from tests.quantised_checkpoints import logits_of, write_plain, write_tensors
from tests.quantised_formats import FORMATS, NOT_PACKED, PACKED_AS

TOKENS = torch.tensor([[1, 5, 9, 3, 7, 2, 11]])
EXPERTS, LAYERS = 5, 2
QUICK = ("fp8 blocks F32", "int4 zeros", "deepseek fp4", "nvfp4 modelopt", "gptq")


def config_of(**changes):
    sizes = {"vocab_size": 64, "hidden_size": 64, "moe_intermediate_size": 96, "intermediate_size": 96}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    experts = {"num_experts": EXPERTS, "num_experts_per_tok": 2, "num_hidden_layers": LAYERS}
    return Qwen3MoeConfig(**sizes, **heads, **experts, eos_token_id=None, pad_token_id=0, **changes)


def is_quantised(name):
    return name.endswith("proj.weight")


def quantise(tensors, name, write, generator):
    """Put a matrix's stored tensors in its place; gives what its owner makes of them."""
    stored, plain = write(tensors.pop(name).float(), generator)
    tensors.update({name.removesuffix("weight") + part: tensor for part, tensor in stored.items()})
    return plain


def make_folders(root, format_name, num_shards=2):
    """A quantised checkpoint, and the plain one that its owner makes of it."""
    _, description, write = FORMATS[format_name]
    plain = write_plain(config_of(), root / "plain")
    stored, generator = dict(write_plain(config_of(), root / "quantised")), torch.Generator().manual_seed(1)
    for name in filter(is_quantised, list(plain)):
        plain[name] = quantise(stored, name, write, generator)
    write_tensors(root / "plain", plain)
    write_tensors(root / "quantised", stored, quantization_config=description, num_shards=num_shards)
    return root / "quantised", plain


SLOW_WEIGHTS = [name for name in FORMATS if name.startswith("hqq ") and name != "hqq axis 0"]
"""More of the same packing, in other bits and dtypes."""


@pytest.mark.parametrize(
    "format_name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW_WEIGHTS else name for name in FORMATS]
)
def test_every_weight_equals_its_owners_dequantisation(format_name, tmp_path):
    pytest.importorskip("compressed_tensors")
    folder, plain = make_folders(tmp_path, format_name)
    entries, dtype = read_weights(folder, read_config(folder), "auto")
    assert dtype == torch.bfloat16
    quantised = [name for name, entry in entries.items() if isinstance(entry, QuantisedEntry)]
    assert quantised == list(filter(is_quantised, entries))
    for name, tensor in plain.items():
        assert torch.equal(lazy_tensor(entries[name])[...], tensor), name


@pytest.mark.parametrize(
    "format_name",
    [
        name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
        for name in FORMATS
        if name not in NOT_PACKED
    ],
)
def test_offloaded_equals_resident_in_place_and_packed(format_name, tmp_path):
    pytest.importorskip("compressed_tensors")
    folder, _ = make_folders(tmp_path, format_name)
    resident = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype="auto")
    expected = logits_of(resident, TOKENS), logits_of(resident, TOKENS[:, :1])
    pack = offload.write_pack(folder, tmp_path / "experts")
    for io in ("cached", "direct"):
        for slots in (2, EXPERTS):
            for packed in (None, pack):
                model = offload.load(folder, cache_experts=slots, io=io, pack=packed)
                forms = [layer.form for layer in model.offload._runtime.layers]
                name = (
                    FORMATS[format_name][0] if packed is None else PACKED_AS.get(format_name, FORMATS[format_name][0])
                )
                assert [form.name for form in forms] == [name] * LAYERS
                assert all(form.expert_bytes < form.layer.plain_bytes for form in forms)
                assert torch.equal(logits_of(model, TOKENS), expected[0])
                assert torch.equal(logits_of(model, TOKENS[:, :1]), expected[1])
                model.offload.close()


@pytest.mark.parametrize(
    "format_name",
    ["hqq axis 0", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gptq sorted unsaid", "hqq across rows"))],
)
def test_groups_that_are_no_runs_of_rows_are_read_in_place_and_not_packed(format_name, tmp_path, monkeypatch):
    unsaid = FORMATS["gptq"][1], FORMATS["gptq sorted"][2]
    monkeypatch.setitem(FORMATS, "gptq sorted unsaid", ("gptq", *unsaid))
    folder, _ = make_folders(tmp_path, format_name)
    resident = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype="auto")
    model = offload.load(folder, cache_experts=2)
    assert torch.equal(logits_of(model, TOKENS), logits_of(resident, TOKENS))
    with pytest.raises(ValueError, match="weights of a group are not neighbours in a row"):
        offload.write_pack(folder, tmp_path / "experts")
    assert not (tmp_path / "experts").exists()


def test_a_packed_copy_may_be_expanded(tmp_path):
    pytest.importorskip("compressed_tensors")
    folder, _ = make_folders(tmp_path, "fp8 blocks F32")
    resident = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype="auto")
    for name in ("plain", "compressed"):  # rows of 96 weights cannot be compressed, and are plain too
        model = offload.load(
            folder, cache_experts=2, pack=offload.write_pack(folder, tmp_path / f"{name}.x", form=name)
        )
        assert [layer.form.name for layer in model.offload._runtime.layers] == ["plain"] * LAYERS
        assert torch.equal(logits_of(model, TOKENS), logits_of(resident, TOKENS))
    with pytest.raises(ValueError, match=r"stores no experts as mxfp4 \(its experts are fp8\)"):
        offload.write_pack(folder, tmp_path / "other", form="mxfp4")
