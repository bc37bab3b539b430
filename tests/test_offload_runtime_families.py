"""Every mixture-of-experts family of transformers, from one generic small configuration: offloaded equals resident.

Nothing here or in the package knows a family by name, except where a configuration refuses the generic sizes.
"""

from pathlib import Path

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import model_type_to_module_name
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import offload
from experiments.evidence.resident import load_resident
from offload.compute.layers.trial import Quickened
from offload.runtime import assembly
from tests.resident import bits_follow_addresses

SMALL = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 96),
    **dict.fromkeys(("hidden_size", "d_model"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layers", "num_layers"), 3),
    **dict.fromkeys(("num_attention_heads", "n_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "index_n_heads", "linear_num_key_heads"), 2),
    **dict.fromkeys(("head_dim", "v_head_dim", "index_head_dim", "qk_head_dim", "mamba_d_head", "mamba_head_dim"), 16),
    **dict.fromkeys(("intermediate_size", "ffn_hidden_size", "intermediate_size_mlp", "shared_intermediate_size"), 48),
    **dict.fromkeys(("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"), 48),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size"), 40),
    **dict.fromkeys(("max_position_embeddings", "max_seq_len"), 128),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 8),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "moe_top_k", "num_experts_per_token"), 2),
    **dict.fromkeys(("top_k_experts", "n_group"), 2),
    **dict.fromkeys(("topk_group", "first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"), 1),
    **dict.fromkeys(("num_shared_experts", "n_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("index_topk", "mamba_n_heads", "mamba_num_heads", "mamba_d_state", "ssm_state_size"), 8),
    **dict.fromkeys(("num_nextn_predict_layers", "mtp_num_hidden_layers", "zero_expert_num"), 0),
    **dict.fromkeys(("hidden_size_per_layer_input", "num_kv_shared_layers", "pad_token_id"), 0),
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "sliding_window": 16,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "mamba_dt_rank": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "enable_moe_block": True,
}
MLA = {"head_dim": 8, "num_key_value_heads": 4, "q_lora_rank": 24}
FULL = {"num_key_value_heads": 4}
REFUSES_GENERIC_SIZES = {
    "dots3_note": FULL,
    "dots3_note_text": FULL,
    "beam": {"mlp_layer_types": ["dense", "sparse", "sparse"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "zaya": {"num_experts_per_tok": 1},
}
OUTER = {"dots3_note": {"vision_config": {"adapter_out_dim": 64}, "audio_config": {"adapter_out_dim": 64}}}
QUICK = ("deepseek_v2", "gpt_oss", "granitemoe", "nemotron_h", "qwen3_next", "aria_text", "mixtral")
NOT_OFFLOADABLE: dict[str, str] = {}
BY_MODULES = {
    "axk1", "cohere2_moe", "deepseek_v4", "gemma4", "gemma4_text", "inkling_text", "kolibri1", "lfm2_moe",
    "minimax_m3_vl_text", "nemotron_h", "phimoe", "zaya",
}  # fmt: skip
"""Families whose feed-forwards do more than choose experts, compute them, and add a shared expert."""


def _families():
    """By the text of transformers' files: to import all of them takes seconds, and every collection would."""
    names = []
    for model_type, class_name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        name = class_name if isinstance(class_name, str) else class_name[0]
        folder = Path(transformers.__file__).parent / "models" / model_type_to_module_name(model_type)
        sources = [file.read_text(encoding="utf-8") for file in folder.glob("modeling_*.py")]
        if any(f"class {name}(" in source and "@use_experts_implementation" in source for source in sources):
            names.append(model_type)
    return names


WIDE = {name: 64 for name, value in SMALL.items() if value in (40, 48)}


def _small_config(model_type, changes=()):
    config_class = CONFIG_MAPPING[model_type]
    whole = config_class()
    text = whole.get_text_config()
    known = text.to_dict().keys() | getattr(type(text), "attribute_map", {}).keys()
    sizes = {name: value for name, value in (SMALL | dict(changes)).items() if name in known}
    if {"kv_lora_rank", "qk_rope_head_dim"} <= known:
        sizes |= {name: value for name, value in MLA.items() if name in known}
    sizes |= REFUSES_GENERIC_SIZES.get(model_type, {})
    if text is whole:
        return config_class(**sizes)
    part = next(name for name, value in vars(whole).items() if value is text)
    return config_class(**{part: type(text)(**sizes)}, **OUTER.get(model_type, {}))


def _small_model(model_type, dtype, changes=()):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(_small_config(model_type, changes)).to(dtype).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts" in name:
                parameter.normal_(0.0, 0.3, generator=generator)
    return model


def _check(model_type, folder, dtype):
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    _small_model(model_type, dtype).save_pretrained(folder, max_shard_size="200KB")
    resident = load_resident(folder)
    tokens = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = resident(tokens, use_cache=False).logits
    assert expected.isfinite().all()
    for cache_experts, io in ((2, "cached"), (5, "direct")):
        model = offload.load(folder, cache_experts=cache_experts, io=io)
        with torch.no_grad():
            found = model(tokens, use_cache=False).logits
        if dtype == torch.float32 and io == "direct" and bits_follow_addresses():  # experts lie as in the file
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(found, expected)
        assert model.offload.report()["misses"] > 0
        model.offload.close()


def _check_compressed(model_type, folder):
    """Everything that can be is compressed: experts in the packed copy, linear layers in memory."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    _small_model(model_type, torch.bfloat16, WIDE).save_pretrained(folder)
    resident = load_resident(folder)
    pack = offload.write_pack(folder, folder / "experts", is_compressed=True)
    model = offload.load(folder, cache_experts=3, pack=pack)
    for tokens in (torch.arange(3, 21).view(2, 9), torch.tensor([[7]])):
        with torch.no_grad():
            expected = resident(tokens, use_cache=False).logits
            assert torch.equal(model(tokens, use_cache=False).logits, expected)
    model.offload.close()
    return [slots.form.name == "compressed" for slots in model.offload._runtime.layers]


@pytest.mark.parametrize("model_type", ["deepseek_v2", "gpt_oss", "qwen3_next", "mixtral"])
@pytest.mark.filterwarnings("ignore")
def test_compressed_family(model_type, tmp_path):
    assert all(_check_compressed(model_type, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("model_type", _families())
@pytest.mark.filterwarnings("ignore")
def test_every_compressed_family(model_type, tmp_path):
    _check_compressed(model_type, tmp_path)


@pytest.mark.parametrize("model_type", QUICK)
@pytest.mark.filterwarnings("ignore")
def test_family(model_type, tmp_path):
    _check(model_type, tmp_path, torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", _families())
@pytest.mark.filterwarnings("ignore")
def test_every_family(model_type, dtype, tmp_path):
    if model_type in NOT_OFFLOADABLE:
        _small_model(model_type, dtype).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=NOT_OFFLOADABLE[model_type]):
            offload.load(tmp_path, cache_experts=2)
    else:
        _check(model_type, tmp_path, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", _families())
@pytest.mark.filterwarnings("ignore")
def test_every_family_token_by_token(model_type, tmp_path, monkeypatch):
    """Our C in the place of feed-forwards gives the bits of their modules, and which families it stands for."""
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    _small_model(model_type, torch.bfloat16, WIDE).save_pretrained(tmp_path)
    found, counted = [], []
    for is_quick in (True, False):
        with monkeypatch.context() as patched:
            if not is_quick:
                patched.setattr(assembly, "quicken_layers", lambda *_: Quickened(0, 0))
            model = offload.load(tmp_path, cache_experts=8, arithmetic="fixed")
        with torch.no_grad():
            found.append([model(torch.tensor([[token]]), use_cache=False).logits for token in range(3, 12)])
        counted.append(model.offload.report()["arithmetic"]["whole_blocks"])
        num_layers = len(model.offload.plan.num_slots)
        model.offload.close()
    assert all(map(torch.equal, *found))
    assert counted == [0 if model_type in BY_MODULES else num_layers, 0]
