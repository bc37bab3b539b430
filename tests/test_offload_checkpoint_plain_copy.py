"""`expertier dequantise`: the plain checkpoint, a matrix at a time, all of it or nothing."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import offload
from offload.checkpoint.quantised import plain_copy
from offload.checkpoint.tensors import read_checkpoint, read_tensor
from tests.quantised_checkpoints import logits_of
from tests.test_offload_formats_quantised import TOKENS, make_folders


@pytest.fixture
def folder(tmp_path):
    folder, _ = make_folders(tmp_path, "fp8 blocks F32")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "hf_quant_config.json").write_text('{"quantization": {}}')
    return folder


def tensors_of(folder):
    return {name: read_tensor(entry) for name, entry in read_checkpoint(folder).items()}


def test_the_copy_is_the_plain_checkpoint(folder, tmp_path, run):
    assert run("dequantise", folder, "--out", tmp_path / "copy") == 0
    expected, found = load_file(tmp_path / "plain" / "model.safetensors"), tensors_of(tmp_path / "copy")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    resident = AutoModelForCausalLM.from_pretrained(tmp_path / "copy", dtype="auto")
    model = offload.load(folder, cache_experts=2)
    assert torch.equal(logits_of(model, TOKENS), logits_of(resident, TOKENS))
    names = {file.name for file in (tmp_path / "copy").iterdir()}
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= names
    assert not names & {"hf_quant_config.json", plain_copy.PLAN_NAME}
    assert "quantization_config" not in json.loads((tmp_path / "copy" / "config.json").read_text())


def test_an_interrupted_copy_goes_on_after_its_last_shard(folder, tmp_path, monkeypatch):
    out, written, real = tmp_path / "copy", [], plain_copy._write_tensor

    def interrupted(entry, file):
        if "layers.1" in entry.name and "again" not in written:
            raise KeyboardInterrupt
        written.append(entry.name)
        return real(entry, file)

    monkeypatch.setattr(plain_copy, "_write_tensor", interrupted)
    with pytest.raises(KeyboardInterrupt):
        offload.dequantise(folder, out, shard_bytes=50_000)
    assert not out.exists()
    part = out.with_name("copy.part")
    complete = {name for file in part.glob("*.safetensors") for name in load_file(file)}
    assert complete
    assert not list(part.glob(".*"))
    written[:] = ["again"]
    offload.dequantise(folder, out, shard_bytes=50_000)
    assert not complete & set(written)
    assert not part.exists()
    whole = offload.dequantise(folder, tmp_path / "whole")
    found, expected = tensors_of(out), tensors_of(whole)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_copy_of_another_dtype_rounds_once(folder, tmp_path):
    offload.dequantise(folder, tmp_path / "copy", dtype="float32")
    tensors = tensors_of(tmp_path / "copy")
    name = "model.layers.0.mlp.experts.0.up_proj.weight"
    stored = {key: read_tensor(entry) for key, entry in read_checkpoint(folder).items() if key.startswith(name)}
    scale = stored[f"{name}_scale_inv"].repeat_interleave(40, 0)[:96].repeat_interleave(40, 1)[:, :64]
    assert torch.equal(tensors[name], stored[name].float() * scale)


def test_what_cannot_be_written(folder, tmp_path):
    with pytest.raises(ValueError, match="none of its weights is quantised"):
        offload.dequantise(tmp_path / "plain", tmp_path / "copy")
    with pytest.raises(ValueError, match="exists already"):
        offload.dequantise(folder, folder)
    with pytest.raises(ValueError, match="dtype must be"):
        offload.dequantise(folder, tmp_path / "copy", dtype="int8")
    (tmp_path / "copy.part").mkdir()
    with pytest.raises(ValueError, match="is in the way"):
        offload.dequantise(folder, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
