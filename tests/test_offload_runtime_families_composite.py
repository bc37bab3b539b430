"""Checkpoints of classes with more than a text part, saved with the outer config: read as transformers reads them.

`AutoModelForCausalLM` takes the text part of some of them; the others are read as the class that the config names.
"""

import json

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

import offload
from tests.test_offload_runtime_families import MLA, REFUSES_GENERIC_SIZES, SMALL

PART = {
    **dict.fromkeys(("hidden_size", "embed_dim", "d_model", "adapter_in_dim", "adapter_input_size"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "encoder_ffn_dim", "mlp_dim"), 32),
    **dict.fromkeys(("depth", "num_hidden_layers", "num_layers", "encoder_layers"), 1),
    **dict.fromkeys(("num_heads", "num_attention_heads", "encoder_attention_heads", "num_key_value_heads"), 2),
    **dict.fromkeys(("out_hidden_size", "text_hidden_size", "output_dim", "adapter_out_dim", "projection_dim"), 64),
    "deepstack_visual_indexes": [0],
    "fullatt_block_indexes": [0],
    "head_dim": 16,
    "image_size": 28,
    "num_position_embeddings": 16,
}
"""Sizes of what is not text."""
SPARSE = {"mlp_layer_types": ["dense", "sparse", "sparse"]}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
SPECIAL = {
    "deepseek_ocr2_text": SPARSE,
    "dots3_note_vision_encoder": {"num_hidden_layers": 42},
    "ernie4_5_vl_moe_text": {
        **SPARSE,
        "moe_intermediate_size": [40, 24],
        "rope_parameters": {**ROPE, "mrope_section": [3, 3, 2]},
    },
    "glm4v_moe_text": {"rope_parameters": {**ROPE, "mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5}},
    "glm5_next_text": {**SPARSE, "index_kpool": 4, "qk_rope_head_dim": 0},
    "mistral4": {"num_key_value_heads": 4, "head_dim": 16},
    "muse_spark_audio": {"num_hidden_layers": 4},
}
"""By model type of a part: what its class asks for besides generic sizes."""
QUICK = ("qwen3_5_moe", "qwen3_vl_moe", "ernie4_5_vl_moe", "gemma4")
SLOW = (
    *("aria", "deepseek_ocr2", "dots3_note", "glm4v_moe", "glm5_next", "inkling2", "inkling_mm_model", "minimax_m3_vl"),
    *("mistral4", "mistral_large4", "muse_spark", "qwen3_omni_moe_thinker", "qwen4_exp", "unlimited_ocr"),
)


def _small(config, table):
    known = config.to_dict().keys() | getattr(type(config), "attribute_map", {}).keys()
    sizes = {name: value for name, value in table.items() if name in known}
    if {"kv_lora_rank", "qk_rope_head_dim"} <= known:
        sizes |= {name: value for name, value in MLA.items() if name in known}
    sizes |= REFUSES_GENERIC_SIZES.get(config.model_type, {}) | SPECIAL.get(config.model_type, {})
    for name in getattr(type(config), "sub_configs", {}):
        if getattr(config, name, None) is not None:
            sizes[name] = _small(getattr(config, name), SMALL if "text" in name else PART)
    return type(config)(**sizes)


def _save(model_type, folder):
    """A tiny model with all its parts; gives the class that transformers reads it with."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = _small(CONFIG_MAPPING[model_type](), SMALL)
    whole = getattr(transformers, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[model_type])
    model = whole(config).to(torch.bfloat16).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts" in name:
                parameter.normal_(0.0, 0.3, generator=generator)
    model.save_pretrained(folder)
    return AutoModelForCausalLM if type(config) in AutoModelForCausalLM._model_mapping else whole


def _check(model_type, folder):
    reader = _save(model_type, folder)
    resident = reader.from_pretrained(folder).eval()
    model = offload.load(folder, cache_experts=3)
    assert type(model) is type(resident)
    assert model.dtype == resident.dtype
    assert model.generation_config.to_diff_dict() == resident.generation_config.to_diff_dict()
    tokens = torch.arange(3, 12)[None]
    with torch.no_grad():
        expected = resident(input_ids=tokens, use_cache=False).logits
        assert expected.isfinite().all()
        assert torch.equal(model(input_ids=tokens, use_cache=False).logits, expected)
    assert model.offload.report()["misses"] > 0
    model.offload.close()
    return resident


@pytest.mark.parametrize("model_type", QUICK)
@pytest.mark.filterwarnings("ignore")
def test_composite(model_type, tmp_path):
    _check(model_type, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", SLOW)
@pytest.mark.filterwarnings("ignore")
def test_every_composite(model_type, tmp_path):
    _check(model_type, tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_experts_that_two_modules_share_are_refused(tmp_path):
    _save("diffusion_gemma", tmp_path)
    with pytest.raises(ValueError, match="shared by two modules"):
        offload.load(tmp_path, cache_experts=3)


@pytest.mark.filterwarnings("ignore")
def test_a_packed_copy_of_experts_that_are_stored_the_other_way_round(tmp_path):
    reader = _save("qwen3_vl_moe", tmp_path / "model")
    resident = reader.from_pretrained(tmp_path / "model").eval()
    tokens = torch.arange(3, 12)[None]
    model = offload.load(
        tmp_path / "model", cache_experts=2, pack=offload.write_pack(tmp_path / "model", tmp_path / "e")
    )
    with torch.no_grad():
        expected = resident(input_ids=tokens, use_cache=False).logits
        assert torch.equal(model(input_ids=tokens, use_cache=False).logits, expected)
    model.offload.close()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("is_transposed", [True, False])
def test_experts_stored_either_way_round(is_transposed, tmp_path):
    """The conversion of Qwen3-VL looks at shapes: both layouts are in checkpoints."""
    from safetensors.torch import load_file, save_file

    _save("qwen3_vl_moe", tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    shapes = {tuple(tensor.shape) for name, tensor in tensors.items() if name.endswith("experts.gate_up_proj")}
    assert shapes == {(8, 80, 64)}
    if is_transposed:
        for name in [name for name in tensors if ".experts." in name]:
            tensors[name] = tensors[name].transpose(1, 2).contiguous()
        save_file(tensors, file, metadata={"format": "pt"})
    whole = transformers.Qwen3VLMoeForConditionalGeneration
    tokens = torch.arange(3, 12)[None]
    model = offload.load(tmp_path, cache_experts=2)
    with torch.no_grad():
        expected = whole.from_pretrained(tmp_path).eval()(input_ids=tokens, use_cache=False).logits
        assert torch.equal(model(input_ids=tokens, use_cache=False).logits, expected)
    model.offload.close()


@pytest.mark.filterwarnings("ignore")
def test_the_dtype_of_the_inner_config_counts(tmp_path):
    _save("qwen3_5_moe", tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    config["text_config"]["dtype"] = "float16"
    file.write_text(json.dumps(config))
    expected = AutoModelForCausalLM.from_pretrained(tmp_path).dtype
    model = offload.load(tmp_path, cache_experts=2)
    assert model.dtype == expected == torch.float16
    model.offload.close()
