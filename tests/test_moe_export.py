import pytest
import torch
from transformers import AutoModelForCausalLM

from moe import MoEForCausalLM
from moe.conversion.export import export

FAMILIES = [
    pytest.param("olmoe", {"qk_norm": "full", "router": "olmoe"}, id="olmoe"),
    pytest.param("olmoe", {"qk_norm": "full", "router": "qwen3_moe", "tie_word_embeddings": True}, id="olmoe-tied"),
    pytest.param("qwen3_moe", {"qk_norm": "head", "router": "qwen3_moe"}, id="qwen3_moe"),
    pytest.param("qwen3_moe", {"router": "olmoe", "num_dense_layers": 1, "head_dim": 16}, id="qwen3_moe-dense-first"),
    pytest.param("mixtral", {"qk_norm": "none", "router": "mixtral"}, id="mixtral"),
]


@pytest.mark.parametrize(("family", "overrides"), FAMILIES)
def test_exported_checkpoint_gives_the_same_logits_in_transformers_own_class(tiny_config, tmp_path, family, overrides):
    model = MoEForCausalLM(tiny_config(**overrides)).eval()
    export(model, family).save_pretrained(tmp_path / "out")
    native = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert native.config.model_type == family
    token_BS = torch.randint(96, (3, 17))
    with torch.no_grad():
        difference = (native(token_BS).logits - model(token_BS).logits).abs().max()
    assert difference <= 1e-5


@pytest.mark.parametrize(
    ("family", "overrides", "reason"),
    [
        ("mixtral", {"qk_norm": "head", "router": "mixtral"}, "qk_norm must be 'none'"),
        ("mixtral", {"qk_norm": "none", "router": "olmoe"}, "does not renormalise"),
        ("olmoe", {"qk_norm": "full", "num_shared_experts": 1}, "shared experts"),
        ("olmoe", {"qk_norm": "full", "num_dense_layers": 1}, "dense layers"),
        ("olmoe", {"qk_norm": "full", "head_dim": 16}, "head_dim"),
        ("qwen3_moe", {"zero_compute_experts": ["copy"]}, "zero-compute"),
        ("qwen3_moe", {"router": "deepseek_v3"}, "softmax"),
        ("llama", {}, "unknown family"),
    ],
)
def test_what_a_family_cannot_express_is_refused_with_the_reason(tiny_config, family, overrides, reason):
    with pytest.raises(ValueError, match=reason):
        export(MoEForCausalLM(tiny_config(**overrides)), family)
