"""Routers that decide ahead: their plans are exact, are read by, and form batches."""

import numpy as np
import pytest
import torch

import offload
from moe import MoEForCausalLM
from moe.architectures.read_me.token_router import context_of
from offload.prefetch.foreseen import planned_signature
from offload.serve.batches import signatures

MODELS = {
    "readme": {
        "architecture": "readme",
        "architecture_options": {"router_width": 16, "router_heads": 2},
        "num_experts_per_tok": 1,
    },
    "pregate": {"router": "pregate", "router_options": {"ahead": 1}},
    "pregate 2": {"router": "pregate", "router_options": {"ahead": 2}},
}


def saved(tiny_config, folder, name):
    MoEForCausalLM(tiny_config(**MODELS[name])).save_pretrained(folder)
    return torch.randint(96, (1, 5))


@pytest.mark.parametrize("name", MODELS)
def test_plans_are_exactly_what_layers_then_ask_for(tiny_config, name):
    model = MoEForCausalLM(tiny_config(**MODELS[name])).eval()
    plans, asked = {}, []
    for module in model.modules():
        if hasattr(module, "exact_plan"):
            module.register_forward_hook(lambda m, inputs, result: plans.update(m.exact_plan(result, *inputs)))
    for layer in model.model.moe_layers:
        layer.experts.register_forward_pre_hook(lambda _m, inputs: asked.append(inputs[1]))
    model(torch.randint(96, (1, 5)))
    ahead = {"readme": 0, "pregate": 1, "pregate 2": 2}[name]
    assert sorted(plans) == list(range(ahead, 3))
    assert all(torch.equal(plans[layer], asked[layer]) for layer in plans)


@pytest.mark.parametrize("name", MODELS)
def test_planned_reads_change_no_token_and_none_is_wasted(tiny_config, tmp_path, name):
    prompt = saved(tiny_config, tmp_path, name)
    settings = {"max_new_tokens": 40, "do_sample": False}
    plain = offload.load(tmp_path, cache_experts=4)
    planned = offload.load(tmp_path, cache_experts=4, prefetch="plan")
    assert torch.equal(planned.generate(prompt, **settings), plain.generate(prompt, **settings))
    report = planned.offload.report()
    assert report["prefetch"]["is_active"]
    assert report["prefetch"]["issued"] > 0
    assert report["prefetch"]["wasted"] == 0
    assert report["misses"] <= plain.offload.report()["misses"]


def test_only_what_is_missing_is_read_and_the_most_used_first(tiny_config, tmp_path):
    saved(tiny_config, tmp_path, "readme")
    loaded = offload.load(tmp_path, cache_experts=4, prefetch="plan")
    core, asked = loaded.model.moe_layers[0].router.core, []
    runtime = loaded.model.moe_layers[0].experts._expertier_place[0]
    for layer in (0, 2):
        runtime.layers[layer].read_ahead = lambda *given, layer=layer: asked.append((layer, *given))
    runtime.layers[0]._resident[3] = None
    expert_TK = torch.tensor([[1], [3], [2], [2], [6]])
    core.exact_plan = lambda _logits, _context: {2: expert_TK, 0: expert_TK}
    core(context_of(torch.tensor([[1, 2]])))
    assert asked == [(0, 2, [3], 2), (0, 1, [3], 2), (2, 2, [], 3), (2, 1, [], 3), (2, 3, [], 3)]


def test_models_whose_routers_do_not_decide_ahead_are_refused(tiny_config, tmp_path):
    MoEForCausalLM(tiny_config()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="needs routers that decide ahead"):
        offload.load(tmp_path, prefetch="plan")
    with pytest.raises(ValueError, match="no router over token ids"):
        planned_signature(MoEForCausalLM(tiny_config()), [[1, 2]])


def test_signatures_before_running_are_those_of_a_recorded_trace(tiny_config, tmp_path):
    saved(tiny_config, tmp_path, "readme")
    loaded = offload.load(tmp_path, record_trace=True)
    prompts = [torch.randint(96, (length,)).tolist() for length in (3, 7, 5, 4)]
    with torch.no_grad():
        for prompt in prompts:
            loaded(torch.tensor([prompt]), use_cache=False)
    assert np.array_equal(planned_signature(loaded, prompts), signatures(loaded.offload.trace()))
