"""Models whose experts stay in a GGUF file, against the plain model that the file stands for: every logit bit."""

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, Qwen2MoeConfig, Qwen3MoeConfig

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
        return "Q4_K"
    if "ffn_up_exps" in name:
        return "IQ4_XS" if "blk.2" in name else "Q4_1"
    if "ffn_down_exps" in name:
        return "Q6_K" if "blk.1" in name else "Q8_0"
    return "Q5_1"


MODELS = {
    "qwen3moe": (Qwen3MoeConfig(**QWEN, head_dim=64, num_experts=10, norm_topk_prob=True), "qwen3moe"),
    "qwen2moe": (Qwen2MoeConfig(**QWEN, num_experts=6, shared_expert_intermediate_size=512), "qwen2moe"),
    "mixtral": (MixtralConfig(**SIZES, num_local_experts=5, num_experts_per_tok=1), "llama"),
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
    for cache_experts in (1, 3, 10):
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
