"""Quantised checkpoints as the families that publish them name their tensors; two forms in one file."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import offload
from tests.quantised_checkpoints import logits_of, write_tensors
from tests.quantised_formats import deepseek_fp4, fp8_blocks, packed_integers
from tests.test_offload_formats_quantised import TOKENS, quantise
from tests.test_offload_runtime_families import WIDE, _small_model

E8M0 = torch.float8_e8m0fnu
WIDTHS = WIDE | {"moe_intermediate_size": 64, "intermediate_size": 96}


def fp8(weight, generator, **options):
    return fp8_blocks(weight, generator, block=(32, 32), **options)


def fp8_e8m0(weight, generator):
    return fp8(weight, generator, dtype=E8M0, name="scale")


FAMILIES = {
    "deepseek_v4": (deepseek_fp4, fp8_e8m0),
    "minimax_m2": (fp8, fp8),
    "glm4_moe": (fp8, fp8),
    "deepseek_v3": (packed_integers, None),
}
"""What writes an expert's matrix, and a dense one; None leaves it plain."""


@pytest.mark.parametrize(
    "model_type", [name if name == "deepseek_v4" else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_offloaded_equals_resident(model_type, tmp_path):
    pytest.importorskip("compressed_tensors")
    expert, dense = FAMILIES[model_type]
    for name in ("plain", "quantised"):
        _small_model(model_type, torch.bfloat16, WIDTHS).save_pretrained(tmp_path / name)
    plain, generator = load_file(tmp_path / "plain" / "model.safetensors"), torch.Generator().manual_seed(1)
    stored, number = dict(plain), 0
    for name, tensor in list(plain.items()):
        is_expert = ".experts." in name and tensor.dim() == 2 and name.endswith(".weight")
        is_dense = name.endswith(("proj.weight", "wq_a.weight", "wkv.weight", "wo_b.weight")) and not is_expert
        if is_expert or (is_dense and dense is not None and min(tensor.shape) >= 32):
            plain[name] = quantise(stored, name, expert if is_expert else dense, generator)
            number += is_expert
    assert number
    write_tensors(tmp_path / "plain", plain)
    described = {"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic"}
    if expert is packed_integers:
        described = {"quant_method": "compressed-tensors", "config_groups": {}}
    write_tensors(tmp_path / "quantised", stored, quantization_config=described, num_shards=2)
    resident = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype="auto")
    for slots in (2, 8):
        model = offload.load(tmp_path / "quantised", cache_experts=slots)
        assert all(layer.form.name != "plain" for layer in model.offload._runtime.layers)
        assert torch.equal(logits_of(model, TOKENS), logits_of(resident, TOKENS))
        model.offload.close()
