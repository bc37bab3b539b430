"""Which files, class, config and dtype make a model: as transformers chooses, or one clear line."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, OlmoeConfig

import offload
from offload.checkpoint import location
from offload.checkpoint.location import local_folder
from offload.checkpoint.model_folder import read_config
from offload.checkpoint.tensors import read_checkpoint

TOKENS = torch.arange(3, 12)[None]


@pytest.fixture
def folder(tmp_path):
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "num_experts": 4, "num_experts_per_tok": 2}
    config = OlmoeConfig(**sizes, **heads, eos_token_id=7, pad_token_id=0, bos_token_id=1)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def _change(file, **values):
    found = json.loads(file.read_text())
    file.write_text(json.dumps({**found, **values}))


def _change_tensors(folder, change):
    tensors = change(load_file(folder / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _same(folder):
    resident = AutoModelForCausalLM.from_pretrained(folder)
    model = offload.load(folder, cache_experts=2)
    assert model.dtype == resident.dtype
    assert model.generation_config.to_diff_dict() == resident.generation_config.to_diff_dict()
    with torch.no_grad():
        assert torch.equal(model(TOKENS, use_cache=False).logits, resident(TOKENS, use_cache=False).logits)
    model.offload.close()


def test_one_file_wins_over_an_index(folder):
    tensors = load_file(folder / "model.safetensors")
    stale = "model-00001-of-00001.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(tensors, stale)}))
    _same(folder)
    save_file({name: tensor * 0.5 for name, tensor in tensors.items()}, folder / stale, metadata={"format": "pt"})
    _same(folder)


def test_the_file_that_the_config_names_wins_over_both(folder):
    tensors = load_file(folder / "model.safetensors")
    other = {name: (tensor * 0.5).contiguous() for name, tensor in tensors.items()}
    save_file(other, folder / "half.safetensors", metadata={"format": "pt"})
    _change(folder / "config.json", transformers_weights="half.safetensors")
    _same(folder)
    _change(folder / "config.json", transformers_weights="../half.safetensors")
    with pytest.raises(ValueError, match="no safetensors file there"):
        read_checkpoint(folder)


def test_shards_in_a_subfolder(folder):
    (folder / "parts").mkdir()
    (folder / "model.safetensors").rename(folder / "parts" / "a.safetensors")
    names = load_file(folder / "parts" / "a.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "parts/a.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    _same(folder)


@pytest.mark.parametrize("first", [torch.float16, torch.float64])
def test_without_a_dtype_in_the_config_the_first_floating_tensor_counts(folder, first):
    config = json.loads((folder / "config.json").read_text())
    del config["dtype"]
    (folder / "config.json").write_text(json.dumps(config))
    _change_tensors(folder, lambda tensors: {name: t.to(first) if "norm" in name else t for name, t in tensors.items()})
    resident = AutoModelForCausalLM.from_pretrained(folder)
    model = offload.load(folder, cache_experts=2)
    assert model.dtype == resident.dtype
    model.offload.close()


def test_generation_defaults_come_from_their_file_or_from_the_config(folder):
    _same(folder)
    _change(folder / "generation_config.json", eos_token_id=[5, 6], repetition_penalty=1.5)
    _same(folder)
    assert offload.load(folder, cache_experts=2).generation_config.eos_token_id == [5, 6]
    (folder / "generation_config.json").unlink()
    _same(folder)
    (folder / "generation_config.json").write_text("{nope")
    with pytest.raises(ValueError, match=r"generation_config\.json cannot be read"):
        offload.load(folder, cache_experts=2)


def test_end_tokens_of_the_generation_config_end_a_text(folder):
    model = offload.load(folder, cache_experts=2)
    free = model.generate(TOKENS, max_new_tokens=6, do_sample=False, eos_token_id=None)[0, 9:].tolist()
    model.offload.close()
    _change(folder / "generation_config.json", eos_token_id=[63, free[2]])
    model = offload.load(folder, cache_experts=2)
    ended = model.generate(TOKENS, max_new_tokens=6, do_sample=False)[0, 9:].tolist()
    assert ended == free[: free.index(free[2]) + 1]
    model.offload.close()


def test_an_unused_tensor_of_an_unknown_dtype_is_no_reason_to_refuse(folder):
    _add_raw_tensor(folder / "model.safetensors", "rotary.codes", "F6_E2M3", 3)
    model = offload.load(folder, cache_experts=2)
    assert model(TOKENS).logits.isfinite().all()
    model.offload.close()


def _add_raw_tensor(file, name, dtype, nbytes):
    raw = file.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    data = raw[8 + size :]
    header[name] = {"dtype": dtype, "shape": [4], "data_offsets": [len(data), len(data) + nbytes]}
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data + bytes(nbytes))


EXPERT = "model.layers.0.mlp.experts.0.gate_proj.weight"


@pytest.mark.parametrize("name", [EXPERT, "model.layers.1.self_attn.q_proj.weight"])
@pytest.mark.parametrize(("dtype", "scale"), [(torch.float8_e4m3fn, "weight_rank"), (torch.int8, "weight_rank")])
def test_quantised_weights_whose_config_is_lost(folder, name, dtype, scale):
    def quantise(tensors):
        scales = {f"{name.removesuffix('weight')}{scale}": torch.ones(1)}
        return {**tensors, name: tensors[name].to(dtype), **scales}

    _change_tensors(folder, quantise)
    with pytest.raises(ValueError, match=rf"{name.replace('.', '.')} is stored as .*{scale}.*quantised"):
        offload.load(folder, cache_experts=2)
    with pytest.raises(ValueError, match="quantised"):
        offload.write_pack(folder, folder.parent / "pack")


def test_codes_in_place_of_a_weight(folder):
    name = "model.layers.1.self_attn.q_proj.weight"

    def quantise(tensors):
        codes = {f"{name}_blocks": torch.zeros(4, dtype=torch.uint8), f"{name}_scales": torch.ones(4)}
        return {other: tensor for other, tensor in tensors.items() if other != name} | codes

    _change_tensors(folder, quantise)
    with pytest.raises(ValueError, match=r"q_proj\.weight_blocks U8 \[4\]: expected \[\.\.\., rows, groups, 16\]"):
        offload.load(folder, cache_experts=2)


@pytest.mark.parametrize("part", [None, "text_config"])
def test_an_unknown_method_of_quantisation_is_one_clear_line(folder, part):
    quantised = {"quantization_config": {"quant_method": "aqlm"}}
    _change(folder / "config.json", **(quantised if part is None else {part: quantised}))
    with pytest.raises(ValueError, match=r"its weights are quantised \(aqlm\); known are mxfp4, fp8"):
        read_config(folder)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "newer_moe"}, "transformers does not know model type 'newer_moe'"),
        ({"model_type": "own", "auto_map": {"AutoConfig": "code.Config"}}, "'own' is Python code in the folder"),
        ({"num_hidden_layers": "many"}, "cannot be read"),
        ({"num_attention_heads": 5}, r"k_norm\.weight has the shape \[32\] in the checkpoint and \[24\]"),
        ({"num_experts": 5}, "needs 5 experts; the checkpoint has 4 tensors"),
        ({"hidden_act": "wave"}, "does not describe a OlmoeForCausalLM"),
    ],
)
def test_a_config_that_cannot_be_used(folder, values, message):
    (folder / "code.py").write_text("raise SystemExit('this must not run')")
    _change(folder / "config.json", **values)
    with pytest.raises(ValueError, match=message) as refused:
        offload.load(folder, cache_experts=2)
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("text", ["{nope", "[1]", "", "\xff"])
def test_a_damaged_config(folder, text):
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"config\.json cannot be read"):
        offload.load(folder, cache_experts=2)


class Hub:
    """Stands for the network: a repository that is a folder; notes what is asked for, and in which order."""

    def __init__(self, repository, cache):
        self.repository, self.cache, self.asked = repository, cache, []

    def snapshot_download(self, name, *, revision, allow_patterns, **how):
        from fnmatch import fnmatch

        self.asked.append((name, revision, tuple(allow_patterns), how))
        for file in self.repository.iterdir():
            if any(fnmatch(file.name, pattern) for pattern in allow_patterns):
                self._copy(file)
        return str(self.cache)

    def hf_hub_download(self, name, file_name, *, revision, **how):
        from huggingface_hub.errors import EntryNotFoundError

        self.asked.append((name, revision, file_name, how))
        if not (self.repository / file_name).is_file():
            raise EntryNotFoundError("404")
        self._copy(self.repository / file_name)

    def _copy(self, file):
        self.cache.mkdir(exist_ok=True)
        (self.cache / file.name).write_bytes(file.read_bytes())


@pytest.fixture
def hub(folder, tmp_path, monkeypatch):
    hub = Hub(folder, tmp_path / "c0ffee")
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub.snapshot_download)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", hub.hf_hub_download)
    for name in ("README.md", "pytorch_model.bin", "original.safetensors", "code.py"):
        (folder / name).write_text("not wanted")
    return hub


def test_a_download_takes_one_commit_and_nothing_else(folder, hub):
    found = local_folder("owner/name@v2", token="secret", local_files_only=True)
    assert found == hub.cache
    assert sorted(file.name for file in found.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    assert [revision for _, revision, _, _ in hub.asked] == ["v2", "c0ffee"]
    assert all(how == {"token": "secret", "local_files_only": True} for *_, how in hub.asked)


def test_a_download_of_shards_takes_those_that_the_index_names(folder, hub):
    tensors = load_file(folder / "model.safetensors")
    for place, name in enumerate(("model-1-of-2.safetensors", "model-2-of-2.safetensors")):
        save_file(dict(list(tensors.items())[place::2]), folder / name, metadata={"format": "pt"})
    weight_map = {name: f"model-{1 + place % 2}-of-2.safetensors" for place, name in enumerate(tensors)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "model.safetensors").unlink()
    found = local_folder("owner/name")
    assert {file.name for file in found.glob("*.safetensors")} == set(weight_map.values())
    assert read_checkpoint(found).keys() == tensors.keys()


def test_a_model_quantised_in_an_unknown_way_is_refused_before_its_weights_come(folder, hub):
    _change(folder / "config.json", quantization_config={"quant_method": "aqlm"})
    with pytest.raises(ValueError, match="quantised"):
        local_folder("owner/name")
    assert len(hub.asked) == 1


def test_a_download_that_fails_is_one_line(folder, monkeypatch):
    def fail(*args, **options):
        raise RuntimeError("\n401 Client Error\n\nlong story")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(ValueError, match=r"can be downloaded \(RuntimeError: 401 Client Error\)$"):
        local_folder("owner/name")


def test_names_that_cannot_be_models(folder):
    for name in ("nowhere", "/no/such/folder", "./no", "a/b/c", "owner/"):
        with pytest.raises(ValueError, match="no such folder"):
            location.local_name(name)
    with pytest.raises(ValueError, match="give the folder"):
        location.local_name(folder / "config.json")


def test_int8_rows_whose_config_is_lost_are_read_with_their_scales(folder):
    name, codes_FD, scale_F = "model.layers.1.self_attn.q_proj.weight", torch.arange(32 * 32), 0.5 + torch.arange(32.0)
    codes_FD = codes_FD.view(32, 32).remainder(255).sub(127)
    plain_FD = codes_FD * scale_F[:, None] / 127
    _change_tensors(folder, lambda tensors: {**tensors, name: plain_FD.to(tensors[name].dtype)})
    expected = offload.load(folder, cache_experts=2)(TOKENS).logits
    scales = {f"{name.removesuffix('weight')}SCB": scale_F}
    _change_tensors(folder, lambda tensors: {**tensors, name: codes_FD.to(torch.int8), **scales})
    assert torch.equal(offload.load(folder, cache_experts=2)(TOKENS).logits, expected)
