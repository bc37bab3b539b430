"""The GPU tier on a simulated device: bits, slots, budgets, faults; and on a real one where there is one."""

import json
import os
import shutil

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, GptOssConfig, MixtralConfig, OlmoeConfig, Qwen3MoeConfig

import offload
from offload import gpu_loading, gpu_rows
from tests.simulated_lane import SimulatedLane

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "eos_token_id": None,
    "pad_token_id": 0,
}
QWEN = {**SIZES, "intermediate_size": 48, "head_dim": 8}
CONFIGS = {
    "olmoe": lambda: OlmoeConfig(**SIZES, intermediate_size=24, num_experts=8, num_experts_per_tok=2),
    "qwen3_moe": lambda: Qwen3MoeConfig(**QWEN, moe_intermediate_size=21, num_experts=7, num_experts_per_tok=3),
    "gpt_oss": lambda: GptOssConfig(**QWEN, num_local_experts=6, num_experts_per_tok=2, sliding_window=16),
    "mixtral": lambda: MixtralConfig(**SIZES, intermediate_size=24, num_local_experts=1, num_experts_per_tok=1),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folder and resident model of a configuration, made once."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    made = {}

    def make(name, dtype=torch.float32):
        if (name, dtype) not in made:
            folder = tmp_path_factory.mktemp(name)
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(CONFIGS[name]()).to(dtype)
            with torch.no_grad():
                for parameter_name, parameter in model.named_parameters():
                    if "experts" in parameter_name or "router" in parameter_name:
                        parameter.normal_(0, 0.3)
            model.save_pretrained(folder, max_shard_size="100KB")
            resident = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager")
            made[name, dtype] = (folder, resident.eval())
        return made[name, dtype]

    return make


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def load(monkeypatch):
    """`offload.load` on a simulated device; its lane is `model.lane`."""
    models = []

    def load_simulated(folder, *, seed=0, copy_share=0.5, pins=True, kernels=False, **arguments):
        lane = SimulatedLane(seed, copy_share, pins)
        monkeypatch.setattr(gpu_loading, "LANES", {"cuda": lambda: lane})
        if not kernels:
            monkeypatch.setattr(gpu_rows, "experts_for", None)
            monkeypatch.setattr(
                "offload.gpu_tier.experts_for", lambda module, count, *_: gpu_rows.LoopExperts(module, count)
            )
        model = offload.load(folder, device="cuda", **arguments)
        model.lane = lane
        models.append(model)
        return model

    yield load_simulated
    for model in models:
        model.offload.close()


PROMPT = torch.randint(0, 97, (1, 21), generator=torch.Generator().manual_seed(1))


def run(model, prompt=PROMPT, steps=10, device="cpu"):
    """Logits of a prefill and of some decoding steps with given tokens."""
    outputs = []
    with torch.inference_mode():
        output = model(prompt.to(device), use_cache=True)
        outputs.append(output.logits)
        for step in range(steps):
            token = prompt[:, step : step + 1].to(device)
            output = model(token, past_key_values=output.past_key_values, use_cache=True)
            outputs.append(output.logits)
    return torch.cat(outputs, dim=1)


@pytest.mark.parametrize("copy_share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", ["olmoe", "qwen3_moe", "gpt_oss", "mixtral"])
def test_bits_depend_neither_on_slots_nor_on_when_copies_happen(saved, load, tolerance, name, copy_share):
    folder, resident = saved(name)
    expected = run(load(folder, gpu_experts=8, cache_experts=8))
    torch.testing.assert_close(expected, run(resident), **tolerance[torch.float32])
    for seed, (gpu_experts, cache_experts) in enumerate([(1, 1), (2, 1), (3, 5), (5, 3), (1, 8)]):
        arguments = {"gpu_experts": gpu_experts, "cache_experts": cache_experts}
        model = load(folder, seed=seed, copy_share=copy_share, policy="lru", **arguments)
        assert torch.equal(run(model), expected), arguments
        report = model.offload.report()["gpu"]
        assert report["misses"] > 0
        assert report["copied_bytes"] > 0
