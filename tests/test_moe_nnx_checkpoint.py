"""Checkpoints go back and forth between torch and JAX bit for bit."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import offload
from moe import MoEForCausalLM

pytest.importorskip("jax", reason="needs the extra expertier[jax]")
nnx = pytest.importorskip("flax.nnx", reason="needs the extra expertier[jax]")

from moe.nnx import MoEForCausalLM as Twin  # noqa: E402
from moe.nnx import load_pretrained, save_pretrained  # noqa: E402

VARIANTS = {
    "plain": {"num_dense_layers": 1, "num_shared_experts": 1},
    "deepseek-v3": {"router": "deepseek_v3"},
    "moepp-tied": {
        "router": "moepp",
        "zero_compute_experts": ["zero", "copy", "constant"],
        "tie_word_embeddings": True,
    },
    "pregate-rmoe": {"router": "pregate", "router_options": {"inner": "rmoe"}},
}
each_variant = pytest.mark.parametrize("overrides", VARIANTS.values(), ids=list(VARIANTS))


@each_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_to_jax_to_torch_keeps_every_bit_key_and_dtype(tiny_config, tmp_path, overrides, dtype):
    model = MoEForCausalLM(tiny_config(**overrides)).to(dtype)
    model.save_pretrained(tmp_path / "torch")
    save_pretrained(load_pretrained(tmp_path / "torch"), tmp_path / "jax")
    before, after = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("torch", "jax"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert torch.equal(tensor, after[name]), name


def test_a_model_born_in_jax_gives_the_same_logits_in_torch(tiny_config, tmp_path):
    twin = Twin(tiny_config(router="rmoe"), nnx.Rngs(1))
    save_pretrained(twin, tmp_path)
    token_BS = torch.randint(96, (2, 9))
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path)(token_BS).logits
    np.testing.assert_allclose(nnx.jit(twin)(token_BS.numpy()).logits, theirs, atol=1e-5, rtol=1e-5)


def test_a_model_born_in_jax_generates_with_its_experts_offloaded(tiny_config, tmp_path):
    save_pretrained(Twin(tiny_config(router="deepseek_v3"), nnx.Rngs(2)), tmp_path)
    prompt = torch.randint(1, 96, (1, 7))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path).generate(prompt, max_new_tokens=5, do_sample=False)
    model = offload.load(tmp_path, cache_experts=2)
    assert torch.equal(plain, model.generate(prompt, max_new_tokens=5, do_sample=False))


def test_a_checkpoint_in_several_files_is_read(tiny_config, tmp_path):
    model = MoEForCausalLM(tiny_config())
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    twin = load_pretrained(tmp_path)
    np.testing.assert_array_equal(
        twin.model.layers[0].self_attn.q_proj.kernel[...].T, model.model.layers[0].self_attn.q_proj.weight.detach()
    )


def test_what_does_not_fit_is_refused(tiny_config, tmp_path):
    with pytest.raises(ValueError, match=r"no config\.json"):
        load_pretrained(tmp_path)
    twin = Twin(tiny_config(), nnx.Rngs(0))
    save_pretrained(twin, tmp_path)
    config_file = tmp_path / "config.json"
    config = json.loads(config_file.read_text())
    config_file.write_text(json.dumps(config | {"num_experts": 8}))
    with pytest.raises(ValueError, match="fits a shape"):
        load_pretrained(tmp_path)
    config_file.write_text(json.dumps(config | {"num_shared_experts": 1}))
    with pytest.raises(ValueError, match="tensors are missing"):
        load_pretrained(tmp_path)
    config_file.write_text(json.dumps(config | {"model_type": "llama"}))
    with pytest.raises(ValueError, match="'llama'"):
        load_pretrained(tmp_path)
