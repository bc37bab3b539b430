"""Mixture-of-Recursions: against plain loops, decoding, caches, padding, and the traps of the official code."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from moe import MoEForCausalLM

LAYERS = {"num_hidden_layers": 4, "intermediate_size": 40, "architecture": "mixture_of_recursions"}
CASES = {
    "expert": {"choice": "expert"},
    "expert first keys": {"choice": "expert", "keys": "first", "recursions": 3},
    "expert separate mlp": {"choice": "expert", "predictor": "separate", "router": "mlp"},
    "token": {"choice": "token", "recursions": 3},
    "token bias first keys": {"choice": "token", "balance": "bias", "score": "sigmoid", "keys": "first"},
    "none": {"choice": "none", "recursions": 3},
    "none first keys": {"choice": "none", "keys": "first"},
    "expert moe": {"choice": "expert", "feed_forward": "moe", "recursions": 3},
    "token moe first keys": {"choice": "token", "feed_forward": "moe", "keys": "first"},
}
each_case = pytest.mark.parametrize("options", CASES.values(), ids=list(CASES))


@pytest.fixture
def build(tiny_config):
    def make(options, **overrides):
        options = {"feed_forward": "dense", **options}
        return MoEForCausalLM(tiny_config(**LAYERS, architecture_options=options, **overrides)).eval()

    return make


@each_case
def test_decoding_with_a_cache_equals_the_prefill_column_by_column(build, tolerance, options):
    model = build(options)
    token_BS = torch.randint(96, (3, 11))
    with torch.no_grad():
        whole = model(token_BS).logits
        step = model(token_BS[:, :4], use_cache=True)
        torch.testing.assert_close(step.logits, whole[:, :4], **tolerance[torch.float32])
        for position in range(4, 11):
            cache = step.past_key_values
            step = model(token_BS[:, position : position + 1], past_key_values=cache, use_cache=True)
            torch.testing.assert_close(step.logits[:, 0], whole[:, position], **tolerance[torch.float32])


@each_case
def test_left_padding_does_not_change_what_is_generated(build, options):
    model = build(options)
    prompt = torch.randint(1, 96, (1, 7))
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), prompt], dim=1)
    batch = torch.cat([padded, torch.randint(1, 96, (1, 11))])
    mask = torch.ones_like(batch)
    mask[0, :4] = 0
    alone = model.generate(prompt, max_new_tokens=6, do_sample=False)[0, 7:]
    together = model.generate(batch, attention_mask=mask, max_new_tokens=6, do_sample=False)[0, 11:]
    assert torch.equal(alone, together)


@each_case
def test_a_checkpoint_round_trip_keeps_the_logits(build, tmp_path, options):
    model = build(options)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    token_BS = torch.randint(96, (2, 9))
    with torch.no_grad():
        assert torch.equal(model(token_BS).logits, loaded(token_BS).logits)
