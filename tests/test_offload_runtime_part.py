"""A part of a model: the experts of one of several processes, with the rest of the weights or without."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GptOssConfig

import offload
from offload.checkpoint.experts import experts_modules
from tests.gguf_models import TinyGguf, metadata_of
from tests.test_offload_runtime_gguf import SIZES, mixed

OWN = [[1, 3], [0, 2, 5], []]
OPTIONS = {"cpu_memory": "4GiB", "prefetch": "off", "arithmetic": "fixed", "context": 64}


@pytest.fixture(scope="module", params=["safetensors", "gguf"])
def folder(request, tmp_path_factory):
    """A model with biases in its experts, which are loaded with them."""
    place = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    config = GptOssConfig(**SIZES, head_dim=64, num_local_experts=6, num_experts_per_tok=2, sliding_window=8)
    model = AutoModelForCausalLM.from_config(config).float()
    if request.param == "gguf":
        return TinyGguf(model, "gpt-oss", mixed).write(place / "model.gguf", metadata_of(config))
    model.to(torch.bfloat16).save_pretrained(place)
    return place


@torch.no_grad()
def test_experts_without_the_rest_are_those_of_the_whole_model(folder):
    whole = offload.load(folder, **OPTIONS)
    part = offload.load(folder, part=offload.Part(experts_of=lambda experts_L: OWN, has_rest=False), **OPTIONS)
    assert part.offload.num_slots == (2, 3, 1)
    plan, of_all = part.offload.plan, whole.offload.plan
    # biases of experts, and no matrix of attention, head or embedding
    assert 0 < plan.weight_bytes < of_all.weight_bytes / 15
    assert (plan.kv_bytes, of_all.kv_bytes > 0) == (0, True)
    pairs = zip(experts_modules(part).values(), experts_modules(whole).values(), OWN, strict=True)
    for ours, right, own in pairs:
        for expert in own:
            given = torch.randn(3, 256).bfloat16(), torch.full((3, 1), expert), torch.ones(3, 1)
            assert torch.equal(ours(*given), right(*given))
    for model in (part, whole):
        model.offload.close()


@torch.no_grad()
def test_a_long_prompt_reads_no_expert_of_others_ahead(folder):
    part = offload.load(folder, part=offload.Part(experts_of=lambda experts_L: OWN, has_rest=True), **OPTIONS)
    first, second, _ = experts_modules(part).values()
    rows = 40
    first(torch.randn(rows, 256).bfloat16(), torch.full((rows, 1), 1), torch.ones(rows, 1))
    part.offload.runtime.store.quiesce()
    slots = part.offload.runtime.layers[1]
    assert {expert for expert in range(6) if expert in slots} <= set(OWN[1])
    second(torch.randn(2, 256).bfloat16(), torch.tensor([[0], [5]]), torch.ones(2, 1))
    closed = []
    part.offload.at_close.append(lambda: closed.append("told"))
    part.offload.close()
    part.offload.close()
    assert closed == ["told"]


def test_what_a_part_cannot_have_is_refused(folder, tmp_path):
    part = offload.Part(experts_of=lambda experts_L: OWN, has_rest=True)
    for wrong in ({"prefetch": "auto"}, {"plan": tmp_path / "plan.json"}, {"gpu_memory": "1GiB"}):
        with pytest.raises(ValueError, match="a part of a model is on the CPU, without prefetching"):
            offload.load(folder, part=part, **OPTIONS | wrong)
