"""Packed copies: same bits, resumable, and no damage goes unnoticed."""

import json
import os
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, GptOssConfig, MixtralConfig

import offload
from offload.store import packing

SHARED = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}


@pytest.fixture(params=["mixtral", "gpt_oss"])
def folder(request, tmp_path):
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    config = MixtralConfig(**SHARED) if request.param == "mixtral" else GptOssConfig(**SHARED, head_dim=8)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model", max_shard_size="30KB")
    return tmp_path / "model"


@pytest.fixture
def tokens():
    return torch.randint(0, 64, (1, 9), generator=torch.Generator().manual_seed(1))


def _pack(folder):
    return packing.write_pack(folder, folder.parent / "experts")


@pytest.mark.parametrize("io", ["cached", "direct"])
def test_same_bits_as_from_the_checkpoint(folder, tokens, io):
    expected = offload.load(folder, cache_experts=2)(tokens).logits
    model = offload.load(folder, cache_experts=2, pack=_pack(folder), io=io)
    assert torch.equal(model(tokens).logits, expected)
    assert not list(folder.parent.glob("*.part*"))


def test_shards_of_one_name_in_two_folders_are_told_apart(folder, tokens):
    index_file = folder / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    for number, shard in enumerate(sorted(set(index["weight_map"].values()))):
        place = folder / str(number) / "weights.safetensors"
        place.parent.mkdir()
        (folder / shard).rename(place)
        index["weight_map"] = {
            name: f"{number}/weights.safetensors" if file == shard else file
            for name, file in index["weight_map"].items()
        }
    index_file.write_text(json.dumps(index))
    expected, pack = offload.load(folder, cache_experts=2)(tokens).logits, _pack(folder)
    assert torch.equal(offload.load(folder, cache_experts=2, pack=pack)(tokens).logits, expected)
    for changed in (folder / "0", folder / str(number)):
        file = changed / "weights.safetensors"
        before = file.stat()
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
        with pytest.raises(ValueError, match="made from other files"):
            offload.load(folder, cache_experts=2, pack=pack)
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    offload.load(folder, cache_experts=2, pack=pack)


def test_goes_on_where_it_was_interrupted(folder, tokens, monkeypatch):
    written, real = [], packing._write_layer

    def interrupted(store, layer, *rest, **options):
        if layer == 1 and 1 not in written:
            written.append(layer)
            raise KeyboardInterrupt
        written.append(layer)
        return real(store, layer, *rest, **options)

    monkeypatch.setattr(packing, "_write_layer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _pack(folder)
    with pytest.raises(ValueError, match="no such file"):
        offload.load(folder, cache_experts=2, pack=folder.parent / "experts")
    file = _pack(folder)
    assert written == [0, 1, 1]
    expected = offload.load(folder, cache_experts=2)(tokens).logits
    assert torch.equal(offload.load(folder, cache_experts=2, pack=file)(tokens).logits, expected)


def test_damage_is_an_error_that_names_file_and_expert(folder, tokens):
    file = _pack(folder)
    with file.open("r+b") as stream:
        for record in range(8):
            stream.seek(record * file.stat().st_size // 8 + 100)
            stream.write(b"\xff\x00\xff")
    model = offload.load(folder, cache_experts=2, pack=file)
    with pytest.raises(OSError, match=r"expert \d of MoE layer 0 failed: .*experts: checksum"):
        model(tokens)
    os.truncate(file, 4096)
    with pytest.raises(ValueError, match="has 4096 bytes instead of"):
        offload.load(folder, cache_experts=2, pack=file)


def test_a_pack_of_another_checkpoint_is_refused(folder):
    file = _pack(folder)
    shard = next(folder.glob("*.safetensors"))
    os.utime(shard, ns=(1, 1))
    with pytest.raises(ValueError, match="made from other files"):
        offload.load(folder, cache_experts=2, pack=file)
    index = file.with_name("experts.json")
    index.write_text(json.dumps({"format": "other"}))
    with pytest.raises(ValueError, match="not the index of a packed copy"):
        offload.load(folder, cache_experts=2, pack=file)


@pytest.mark.parametrize("step", ["index", "records"])
def test_a_crash_at_one_of_the_last_two_files_is_mended_by_the_next_run(folder, step, monkeypatch):
    target = folder.parent / "crash.pack"
    replace, write = Path.replace, packing.PackIndex.write

    def replace_or_crash(self, other):
        if step == "records" and self.name == "crash.pack.part":
            raise KeyboardInterrupt
        return replace(self, other)

    def write_or_crash(self, file):
        if step == "index" and file.name == "crash.pack.json":
            raise KeyboardInterrupt
        write(self, file)

    monkeypatch.setattr(Path, "replace", replace_or_crash)
    monkeypatch.setattr(packing.PackIndex, "write", write_or_crash)
    with pytest.raises(KeyboardInterrupt):
        packing.write_pack(folder, target)
    with pytest.raises(ValueError, match="no such file; make it with `expertier pack`"):
        offload.load(folder, pack=target)
    monkeypatch.undo()
    packing.write_pack(folder, target)
    assert not list(folder.parent.glob("crash.pack.part*"))
    offload.load(folder, pack=target).offload.close()
