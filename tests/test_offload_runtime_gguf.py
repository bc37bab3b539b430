"""Models whose experts stay in a GGUF file, against the plain model that the file stands for: every logit bit."""

import json

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, GptOssConfig, LlamaConfig, MixtralConfig, Qwen2MoeConfig, Qwen3MoeConfig
from transformers.convert_slow_tokenizer import bytes_to_unicode

import offload
from tests.gguf_models import TinyGguf, metadata_of

SIZES = {
    "vocab_size": 97,
    "hidden_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "intermediate_size": 256,
    "tie_word_embeddings": False,
}
QWEN = {**SIZES, "moe_intermediate_size": 256, "num_experts_per_tok": 2}


def mixed(name):
    """As the "_M" files of llama.cpp: types differ within a layer and between layers."""
    if "gate_inp" in name:
        return "F32"
    if "ffn_gate_exps" in name:
        return "Q4_K" if "blk.2" in name else "MXFP4"
    if "ffn_up_exps" in name:
        return "IQ4_XS" if "blk.2" in name else "Q4_1"
    if "ffn_down_exps" in name:
        return "Q6_K" if "blk.1" in name else "Q8_0"
    return "Q5_1"


MODELS = {
    "qwen3moe": (Qwen3MoeConfig(**QWEN, head_dim=64, num_experts=10, norm_topk_prob=True), "qwen3moe"),
    "qwen2moe": (Qwen2MoeConfig(**QWEN, num_experts=6, shared_expert_intermediate_size=512), "qwen2moe"),
    "mixtral": (MixtralConfig(**SIZES, num_local_experts=5, num_experts_per_tok=1), "llama"),
    "gpt-oss": (
        GptOssConfig(**SIZES, head_dim=64, num_local_experts=6, num_experts_per_tok=2, sliding_window=8),
        "gpt-oss",
    ),
    "llama": (LlamaConfig(**SIZES, head_dim=64), "llama"),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """File, resident model and tiny GGUF of a name, made once."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    kept = {}

    def make(name, kind_of=mixed):
        if (name, kind_of) not in kept:
            config, architecture = MODELS[name]
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config).float()
            tiny, folder = TinyGguf(model, architecture, kind_of), tmp_path_factory.mktemp(name)
            metadata = metadata_of(config) | (
                {"ARCH.expert_count": 5, "ARCH.expert_used_count": 1} if name == "mixtral" else {}
            )
            file = tiny.write(folder / "model.gguf", metadata)
            model.load_state_dict(tiny.state)
            model.to(torch.bfloat16).save_pretrained(folder / "plain")
            resident = AutoModelForCausalLM.from_pretrained(folder / "plain", dtype=torch.bfloat16).eval()
            kept[name, kind_of] = file, resident, tiny, metadata
        return kept[name, kind_of]

    return make


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tokens():
    return torch.randint(0, 97, (2, 13), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("io", ["cached", "direct"])
@pytest.mark.parametrize("name", [name for name in MODELS if name != "llama"])
def test_bits_and_tokens_equal_the_plain_model_at_every_cache_size(made, tokens, name, io):
    file, resident, *_ = made(name)
    with torch.no_grad():
        expected = resident(tokens).logits
    expected_ids = resident.generate(tokens, max_new_tokens=6, do_sample=False)
    for cache_experts in (1, 10) if io == "cached" else (3,):
        model = offload.load(file, cache_experts=cache_experts, io=io)
        assert model.dtype == torch.bfloat16
        assert torch.equal(model(tokens).logits, expected)
        assert torch.equal(model.generate(tokens, max_new_tokens=6, do_sample=False), expected_ids)
        model.offload.close()


def test_slots_hold_stored_bytes(made, tokens):
    file, _, tiny, _ = made("qwen3moe")
    model = offload.load(file, cache_experts=10)
    model(tokens)
    stored = sum(data.nbytes for name, (_, data) in tiny.tensors.items() if "_exps" in name)
    # slots begin on blocks of 4 KiB, and each of their three regions has one more for its shift
    slots = model.offload.report()["memory"]["slot_bytes"]
    assert stored <= slots <= stored + 30 * 3 * 2 * 4096
    assert slots < 0.55 * sum(2 * 3 * 256 * 256 for _ in range(30))
    model.offload.close()


def test_split_files_and_the_config_beside_them(made, tokens, tmp_path):
    _, resident, tiny, metadata = made("qwen3moe")
    tiny.write(tmp_path / "model.gguf", metadata, split_max_tensors=7)
    resident.config.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = resident(tokens).logits
    for place in (tmp_path, tmp_path / "model-00002-of-00006.gguf"):
        model = offload.load(place, cache_experts=3)
        assert torch.equal(model(tokens).logits, expected)
        model.offload.close()


def test_a_dense_model_stays_in_memory_whole(made, tokens):
    file, resident, *_ = made("llama")
    model = offload.load(file)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, resident(tokens).logits)
    report = model.offload.report()
    assert report["slots_per_layer"] == []
    assert report["bytes_read"] == 0
    linears = 2 * sum(module.weight.numel() for module in resident.modules() if isinstance(module, torch.nn.Linear))
    assert sum(report["stored_linears"].values()) == 3 * 7 + 1
    assert report["memory"]["weight_bytes"] < 2 * resident.num_parameters() - 0.4 * linears
    assert {name: value.shape for name, value in model.state_dict().items()} == {
        name: value.shape for name, value in resident.state_dict().items()
    }
    for options in ({"record_trace": True}, {"cache_experts": 2}, {"prefetch": "gate"}):
        with pytest.raises(ValueError, match=f"a dense model, .* no experts for {next(iter(options))} to act on"):
            offload.load(file, **options)
    with pytest.raises(ValueError, match=r"too small for a dense model's layers in memory: .* give at least"):
        offload.load(file, cpu_memory="300MiB")


def test_other_dtypes_round_each_weight_once(made, tokens):
    file, _, tiny, _ = made("qwen3moe")
    config, _ = MODELS["qwen3moe"]
    resident = AutoModelForCausalLM.from_config(config, dtype=torch.float32, experts_implementation="grouped_mm").eval()
    resident.load_state_dict(tiny.state)
    model = offload.load(file, cache_experts=2, dtype="float32")
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, resident(tokens).logits)
    model.offload.close()


def changed(tiny, folder, metadata, change):
    """The same file after a change to its tensors."""
    before = dict(tiny.tensors)
    try:
        change(tiny.tensors)
        return tiny.write(folder / "model.gguf", metadata)
    finally:
        tiny.tensors.clear()
        tiny.tensors.update(before)


FAULTS = {
    r"no tensor for model\.layers\.1\.self_attn\.k_norm\.weight": lambda tensors: tensors.pop(
        "blk.1.attn_k_norm.weight"
    ),
    r"no tensor blk\.1\.ffn_up_exps\.weight": lambda tensors: tensors.pop("blk.1.ffn_up_exps.weight"),
    r"blk\.2\.ffn_down_exps\.weight has the shape \[9, 256, 256\]": lambda tensors: tensors.update(
        {"blk.2.ffn_down_exps.weight": ("Q8_0", tensors["blk.2.ffn_down_exps.weight"][1][:9])}
    ),
    r"tensor output_norm\.weight has the shape \[97\]|output_norm": lambda tensors: tensors.update(
        {"output_norm.weight": ("F32", tensors["output_norm.weight"][1][:97])}
    ),
    r"no use for tensor blk\.0\.ffn_up_exps\.scale": lambda tensors: tensors.update(
        {"blk.0.ffn_up_exps.scale": tensors["output_norm.weight"]}
    ),
    r"rope_freqs\.weight stretches the positions": lambda tensors: tensors.update(
        {"rope_freqs.weight": tensors["output_norm.weight"]}
    ),
}


@pytest.mark.parametrize("message", FAULTS)
def test_missing_surplus_and_misshapen_tensors_are_refused_by_name(made, tmp_path, message):
    _, _, tiny, metadata = made("qwen3moe")
    file = changed(tiny, tmp_path, metadata, FAULTS[message])
    with pytest.raises(ValueError, match=message) as refused:
        offload.load(file, cache_experts=2)
    assert str(file) in str(refused.value)


def test_layers_that_predict_further_tokens_are_left_out(made, tokens, tmp_path):
    _, resident, tiny, metadata = made("qwen3moe")
    further = {"blk.3.nextn.eh_proj.weight": tiny.tensors["output_norm.weight"]}
    model = offload.load(changed(tiny, tmp_path, metadata, lambda tensors: tensors.update(further)), cache_experts=2)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, resident(tokens).logits)
    model.offload.close()


def test_architectures_whose_changes_are_unknown_are_refused(made, tmp_path):
    _, _, tiny, metadata = made("qwen3moe")
    writer, tiny.architecture = tiny.architecture, "deepseek2"
    try:
        file = tiny.write(tmp_path / "model.gguf", metadata)
    finally:
        tiny.architecture = writer
    with pytest.raises(ValueError, match=r"unknown GGUF architecture 'deepseek2'.*use the model's safetensors files"):
        offload.load(file, cache_experts=2)


def test_what_a_file_says_and_no_config_takes_up_is_refused(made, tmp_path):
    _, _, tiny, metadata = made("qwen3moe")
    file = tiny.write(tmp_path / "model.gguf", metadata | {"ARCH.attn_logit_softcapping": 50.0})
    with pytest.raises(ValueError, match=r"it says qwen3moe\.attn_logit_softcapping, .* put the model's config\.json"):
        offload.load(file, cache_experts=2)
    MODELS["qwen3moe"][0].save_pretrained(tmp_path)
    offload.load(file, cache_experts=2).offload.close()


def test_a_packed_copy_and_a_gpu_are_refused(made, tmp_path):
    file, *_ = made("qwen3moe")
    (tmp_path / "x.pack").touch()
    with pytest.raises(ValueError, match="a GGUF file is read as it is; leave out the packed copy"):
        offload.load(file, pack=tmp_path / "x.pack")
    with pytest.raises(ValueError, match="they are not packed again"):
        offload.write_pack(file, tmp_path / "y.pack")


def test_fit_and_generate_take_the_file(made, tmp_path, run, capsys):
    """With 256 byte tokens that the file describes, as byte-level vocabularies do."""
    config = Qwen3MoeConfig(**{**QWEN, "vocab_size": 258}, head_dim=64, num_experts=10, norm_topk_prob=True)
    tiny = TinyGguf(AutoModelForCausalLM.from_config(config).float(), "qwen3moe", mixed)
    tokens = [*bytes_to_unicode().values(), "<|end|>", "ab"]
    vocabulary = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * 256 + [3, 1],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.eos_token_id": 256,
        "tokenizer.chat_template": "{{ messages[0].content }}",
    }
    file = tiny.write(tmp_path / "model.gguf", metadata_of(config) | vocabulary)
    assert run("fit", file, "--cpu-memory", "8GiB") == 0
    assert "3 MoE layers x 10 experts of" in capsys.readouterr().out
    report = tmp_path / "report.json"
    assert run("generate", file, "--prompt", "naïve 12", "--max-new-tokens", 5, "--json", report) == 0
    assert json.loads(report.read_text())["prompt_tokens"] == len("naïve 12".encode())
    unknown = tiny.write(tmp_path / "unknown.gguf", metadata_of(config) | vocabulary | {"tokenizer.ggml.pre": "zebra"})
    assert run("generate", unknown, "--prompt", "a") == 2
    assert "splits text by the rule 'zebra'" in capsys.readouterr().err


def test_a_dense_file_is_written_as_a_plain_checkpoint_and_upcycled(made, tokens, tmp_path, run, capsys):
    _, resident, tiny, metadata = made("llama")
    names = [*bytes_to_unicode().values()][:95]
    vocabulary = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [*names, "ab", "<|end|>"],
        "tokenizer.ggml.token_type": [1] * 96 + [3],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.eos_token_id": 96,
    }
    (tmp_path / "there").mkdir()
    file = tiny.write(tmp_path / "there/dense.gguf", metadata | vocabulary)
    assert run("dequantise", file, "--out", tmp_path / "plain") == 0
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()
    for name, value in resident.state_dict().items():
        assert torch.equal(plain.state_dict()[name], value), name
    assert plain.generation_config.eos_token_id == [96]
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "plain").eos_token == "<|end|>"
    wide = offload.dequantise(file, tmp_path / "wide", dtype="float32")
    assert AutoModelForCausalLM.from_pretrained(wide).dtype == torch.float32
    assert run("upcycle", file, "--experts", 3, "--top-k", 2, "--to", "expertier", "--out", tmp_path / "up") == 0
    up = AutoModelForCausalLM.from_pretrained(tmp_path / "up").float().eval()
    torch.testing.assert_close(up(tokens).logits, resident.float()(tokens).logits, atol=1e-4, rtol=1e-4)
    resident.to(torch.bfloat16)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain", "there", "up", "wide"]
    experts, *_ = made("qwen3moe")
    assert run("dequantise", experts, "--out", tmp_path / "no") == 2
    assert "read in place" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "no").exists()
