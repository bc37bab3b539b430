"""Adapters of PEFT on an offloaded model: what they do on the resident one, to the bit, or a refusal."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

import offload
from experiments.evidence.resident import load_resident

IDS = torch.tensor([[7, 3, 11, 5, 2, 9, 30]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "eos_token_id": None}
    config = Qwen3MoeConfig(**sizes, **heads, num_hidden_layers=2, num_experts=8, num_experts_per_tok=2)
    path = tmp_path_factory.mktemp("model")
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(path)
    offload.write_pack(path, path / "experts", is_compressed=True)
    return path


@pytest.fixture(params=[False, True], ids=["plain", "compressed"])
def model(request, folder):
    found = offload.load(folder, cache_experts=3, pack=folder / "experts" if request.param else None)
    yield found
    found.offload.close()


def adapted(model, **targets):
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=4, init_lora_weights=False, **targets)).eval()


def check_equal(found, expected):
    with torch.no_grad():
        for ids in (IDS, IDS[:, :1]):
            assert torch.equal(found(ids, use_cache=False).logits, expected(ids, use_cache=False).logits)


OUTSIDE = [
    pytest.param({"target_modules": ["q_proj", "v_proj", "o_proj"]}, id="attention"),
    pytest.param({"target_modules": ["embed_tokens", "lm_head"]}, id="vocabulary"),
    pytest.param({"target_modules": ["k_proj"], "use_dora": True}, id="dora"),
    pytest.param({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, id="saved"),
    pytest.param({"target_parameters": ["gate.weight"]}, id="router"),
]


@pytest.mark.parametrize("targets", OUTSIDE)
@pytest.mark.filterwarnings("ignore")
def test_adapters_outside_experts_do_what_they_do_on_the_resident_model(folder, model, targets):
    resident, offloaded = adapted(load_resident(folder), **targets), adapted(model, **targets)
    plain = offloaded.get_base_model().get_input_embeddings().weight.dtype
    assert plain == torch.bfloat16
    check_equal(offloaded, resident)
    with offloaded.disable_adapter(), resident.disable_adapter():
        check_equal(offloaded, resident)
    check_equal(copy.deepcopy(offloaded), resident)


@pytest.mark.parametrize("targets", OUTSIDE[:3])
@pytest.mark.filterwarnings("ignore")
def test_merged_adapters(folder, targets):
    model = offload.load(folder, cache_experts=3)
    resident, offloaded = adapted(load_resident(folder), **targets), adapted(model, **targets)
    resident.merge_adapter()
    offloaded.merge_adapter()
    check_equal(offloaded, resident)
    resident.unmerge_adapter()
    offloaded.unmerge_adapter()
    check_equal(offloaded, resident)
    check_equal(offloaded.merge_and_unload(), resident.merge_and_unload())
    model.offload.close()


@pytest.mark.filterwarnings("ignore")
def test_compressed_layers_refuse_to_be_merged_and_stay_right(folder):
    model = offload.load(folder, cache_experts=3, pack=folder / "experts")
    resident, offloaded = (adapted(one, target_modules=["q_proj"]) for one in (load_resident(folder), model))
    with pytest.raises(RuntimeError, match="would change a compressed weight"):
        offloaded.merge_adapter()
    check_equal(offloaded, resident)
    model.offload.close()


@pytest.mark.filterwarnings("ignore")
def test_adapters_are_saved_and_loaded(folder, model, tmp_path):
    resident = adapted(load_resident(folder), target_modules=["q_proj"])
    adapted(model, target_modules=["q_proj"]).save_pretrained(tmp_path / "from_offloaded")
    resident.save_pretrained(tmp_path / "from_resident")
    for saved in ("from_offloaded", "from_resident"):
        again = offload.load(folder, cache_experts=3)
        check_equal(PeftModel.from_pretrained(again, tmp_path / saved).eval(), resident)
        again.offload.close()
    with pytest.raises(ValueError, match="no expert weights to save"):
        model.state_dict()


IN_EXPERTS = [
    {"target_parameters": ["mlp.experts.down_proj"]},
    {"target_parameters": ["model.layers.1.mlp.experts.gate_up_proj"]},
    {"target_modules": "all-linear"},
]


@pytest.mark.parametrize("targets", IN_EXPERTS)
@pytest.mark.filterwarnings("ignore")
def test_adapters_of_experts_are_refused(folder, model, targets):
    with pytest.raises(RuntimeError, match="adapter 'default' changes weights of experts"):
        adapted(model, **{"target_modules": ["q_proj"], **targets})(IDS)
    with pytest.raises(RuntimeError, match="changes weights of experts"):
        copy.deepcopy(model).generate(IDS, max_new_tokens=2, attention_mask=torch.ones_like(IDS), pad_token_id=0)


@pytest.mark.filterwarnings("ignore")
def test_a_second_adapter_of_experts_is_refused_too(model):
    both = adapted(model, target_modules=["q_proj"]).requires_grad_(False)
    both(IDS)
    both.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["experts.down_proj"]))
    with torch.no_grad(), pytest.raises(RuntimeError, match="adapter 'second' changes weights of experts"):
        both(IDS)


@pytest.mark.filterwarnings("ignore")
def test_a_whole_block_of_experts_to_train_is_refused_or_equal(folder, model):
    targets = {"target_modules": ["q_proj"], "modules_to_save": ["mlp"]}
    check_equal(adapted(model, **targets), adapted(load_resident(folder), **targets))
