"""Preferring cached experts: the gates of every softmax family, what is chosen and with which weights, the label."""

import pytest
import torch
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import offload
from moe import MoEForCausalLM
from offload.prefetch.cached_first import CachedFirst
from offload.prefetch.softmax_gates import chosen, softmax_gates
from routing import Carry, RoutingContext

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "initializer_range": 0.2,
}
OF_FAMILY = {
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SIZES, num_experts=8, moe_intermediate_size=24, head_dim=8, norm_topk_prob=True)
    ),
    "olmoe": lambda: OlmoeForCausalLM(OlmoeConfig(**SIZES, num_experts=8, norm_topk_prob=False)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=8, head_dim=8)),
}


@pytest.fixture(params=[*(pytest.param(name, marks=pytest.mark.slow) for name in OF_FAMILY), "ours"])
def model(request, tiny_config):
    if request.param == "ours":
        return MoEForCausalLM(tiny_config(num_experts=8, router_options={"scale": 2.0})).eval()
    return OF_FAMILY[request.param]().eval()


def test_gates_give_their_routers_weights_and_choices(model):
    for gate in softmax_gates(model):
        seen = []
        handle = gate.router.register_forward_hook(
            lambda _m, inputs, result, seen=seen: seen.append((inputs[0], result))
        )
        model(torch.randint(96, (2, 7)))
        handle.remove()
        ((x, result),) = seen
        expert_TK, weight_TK = chosen(result)
        logit_TE = gate.logits(x)
        assert torch.equal(logit_TE.topk(2).indices, expert_TK)
        torch.testing.assert_close(gate.weights(logit_TE, expert_TK), weight_TK.float())


def test_cached_experts_are_chosen_more_the_stronger_the_preference_and_it_is_reported_as_lossy(model, tmp_path):
    model.save_pretrained(tmp_path)
    prompt, settings = torch.randint(96, (1, 5)), {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False}
    hit_rates = []
    for strength in (None, 0.0, 0.3, 1.0):
        loaded = offload.load(tmp_path, cache_experts=3)
        if strength is not None:
            loaded.offload.prefer_cached(strength)
        tokens = loaded.generate(prompt, **settings)
        report = loaded.offload.report()
        hit_rates.append(report["hit_rate"])
        if not strength:
            assert torch.equal(tokens, model.generate(prompt, **settings))
        else:
            assert report["prefer_cached"]["changed"] > 0
        assert ("prefer_cached" in report) == (strength is not None)
        if strength is not None:
            assert report["prefer_cached"]["exactness"] == "lossy"
    # reads land in any order, which decides between experts that were used equally long ago
    assert hit_rates[0] == pytest.approx(hit_rates[1], abs=0.03)
    assert max(hit_rates[:2]) < hit_rates[2] <= hit_rates[3] + 0.03


def test_weights_are_those_of_the_logits_without_the_bonus(tiny_config):
    model = MoEForCausalLM(tiny_config(router="qwen3_moe")).eval()
    gate = softmax_gates(model)[0]
    preference, x = CachedFirst(1.0), torch.randn(1, 32)
    result = gate.router(x, Carry(), RoutingContext())
    ids, weights = chosen(preference._preferring(gate, {1, 4}, x, result))
    assert set(ids[0].tolist()) == {1, 4}
    logits = (x @ gate.weight_ED.T)[0, ids[0]]
    torch.testing.assert_close(weights[0], logits.softmax(dim=0))
    several = torch.randn(3, 32)
    result = gate.router(several, Carry(), RoutingContext())
    assert preference._preferring(gate, {1, 4}, several, result) is result, "prompts are left alone"


@pytest.mark.parametrize("router", ["deepseek_v3", "rmoe", "resident", "pregate", "remoe", "hash"])
def test_other_routers_are_refused(tiny_config, router):
    with pytest.raises(ValueError, match="must be a softmax over one matrix"):
        softmax_gates(MoEForCausalLM(tiny_config(router=router)))


def test_strengths_out_of_range_and_second_preferences_are_refused(tiny_config, tmp_path, run, capsys):
    with pytest.raises(ValueError, match=r"must lie in 0\.\.1; got 1.5"):
        CachedFirst(1.5)
    MoEForCausalLM(tiny_config()).save_pretrained(tmp_path)
    loaded = offload.load(tmp_path, cache_experts=3)
    loaded.offload.prefer_cached(0.1)
    with pytest.raises(ValueError, match="prefers cached experts already"):
        loaded.offload.prefer_cached(0.2)
    assert run("generate", tmp_path, "--prompt", "x", "--prefer-cached", "2") == 2
    assert "--prefer-cached must lie in 0..1" in capsys.readouterr().err
