"""gpt-oss in MXFP4, in place and packed: bit-identical to the resident model of transformers' own dequantisation."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, GptOssConfig
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import offload
from offload.compute.orders import orders
from offload.formats.quantised import QuantisedForm
from tests.quantised_checkpoints import logits_of, random_bytes, random_e8m0, write_plain, write_tensors

TOKENS = torch.tensor([[1, 5, 9, 3, 7, 2, 11]])
EXPERTS, LAYERS = 6, 2


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return make_folders(tmp_path_factory.mktemp("gpt_oss"), width=96)


def make_folders(root, width):
    """The quantised checkpoint, and the plain one that transformers' converter makes of it."""
    config = GptOssConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=width,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
        eos_token_id=None,
        pad_token_id=0,
    )
    tensors = write_plain(config, root / "plain")
    write_plain(config, root / "mxfp4")
    generator = torch.Generator().manual_seed(1)
    stored = dict(tensors)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = stored.pop(name).shape
        stored[f"{name}_blocks"] = random_bytes((experts, rows, columns // 32, 16), generator)
        stored[f"{name}_scales"] = random_e8m0((experts, rows, columns // 32), generator)
        tensors[name] = convert_moe_packed_tensors(stored[f"{name}_blocks"], stored[f"{name}_scales"])
    write_tensors(root / "plain", tensors)
    quantization = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    write_tensors(root / "mxfp4", stored, quantization_config=quantization, num_shards=3)
    return root / "mxfp4", root / "plain"


@pytest.mark.parametrize("io", ["cached", "direct"])
@pytest.mark.parametrize("packed", [False, True])
def test_offloaded_equals_resident(folders, tmp_path, io, packed):
    quantised, plain = folders
    resident = AutoModelForCausalLM.from_pretrained(plain, dtype="auto")
    pack = offload.write_pack(quantised, tmp_path / "experts") if packed else None
    for slots in (2, EXPERTS):
        model = offload.load(quantised, cache_experts=slots, io=io, pack=pack)
        assert [layer.form.name for layer in model.offload._runtime.layers] == ["mxfp4"] * LAYERS
        assert torch.equal(logits_of(model, TOKENS), logits_of(resident, TOKENS))
        assert torch.equal(logits_of(model, TOKENS[:, :1]), logits_of(resident, TOKENS[:, :1]))
        model.offload.close()


def test_prompts_are_multiplied_from_the_stored_bytes(tmp_path, monkeypatch):
    quantised, plain = make_folders(tmp_path, width=128)
    resident = AutoModelForCausalLM.from_pretrained(plain, dtype="auto")
    tokens = torch.randint(0, 64, (1, 90), generator=torch.Generator().manual_seed(0))
    expected, expanded, expand = logits_of(resident, tokens), [], QuantisedForm.expand

    def counted(*arguments):
        expanded.append(arguments)
        expand(*arguments)

    monkeypatch.setattr(QuantisedForm, "expand", counted)
    for slots in (2, EXPERTS):
        model = offload.load(quantised, cache_experts=slots)
        assert torch.equal(logits_of(model, tokens), expected)
        model.offload.close()
    if orders()[0].name == "amx":
        assert not expanded


def test_another_dtype_than_the_checkpoints(folders):
    quantised, plain = folders
    resident = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    model = offload.load(quantised, cache_experts=2, dtype="float32")
    assert torch.equal(logits_of(model, TOKENS), logits_of(resident, TOKENS))


def test_fit_counts_stored_bytes(folders, run, tmp_path):
    assert run("fit", folders[0], "--json", tmp_path / "fit.json") == 0
    report = json.loads((tmp_path / "fit.json").read_text())
    codes, scales = (2 * 96 * 64 + 64 * 96) // 2, (2 * 96 * 64 + 64 * 96) // 32
    assert report["expert_bytes"] == LAYERS * EXPERTS * (codes + scales)


def test_slots_of_a_budget_hold_stored_bytes(folders):
    """Twelve experts in bfloat16 would not fit a budget that holds them as they are stored."""
    model = offload.load(folders[0], cache_experts=EXPERTS)
    form = model.offload._runtime.layers[0].form
    assert form.expert_bytes * 3.7 < form.layer.plain_bytes
    model(TOKENS)
    assert model.offload.report()["bytes_read"] % form.expert_bytes == 0
    model.offload.close()


def test_packing_by_command_in_a_named_form(folders, run, tmp_path, capsys):
    assert run("pack", folders[0], "--out", tmp_path / "a.experts", "--form", "plain") == 0
    model = offload.load(folders[0], cache_experts=2, pack=tmp_path / "a.experts")
    assert [layer.form.name for layer in model.offload._runtime.layers] == ["plain"] * LAYERS
    model.offload.close()
    capsys.readouterr()
    for wrong in (("--form", "mxfp8"), ("--form", "plain", "--compress"), ("--form", "mxfp")):
        assert run("pack", folders[0], "--out", tmp_path / "b.experts", *wrong) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not list(tmp_path.glob("b.experts*"))
