import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moe import MoEConfig, MoEForCausalLM

VARIANTS = {
    "plain": {},
    "dense-first": {"num_dense_layers": 1},
    "shared": {"num_shared_experts": 2},
    "zero-compute": {"zero_compute_experts": ["zero", "copy", "constant", "constant"], "num_experts_per_tok": 3},
    "tied": {"tie_word_embeddings": True},
    "no-qk-norm": {"qk_norm": "none"},
    "full-qk-norm": {"qk_norm": "full"},
    "deepseek": {"router": "deepseek_v3", "router_options": {"num_groups": 3, "groups_kept": 2}},
    "switch": {"router": "switch", "num_experts_per_tok": 1},
}
each_variant = pytest.mark.parametrize("overrides", VARIANTS.values(), ids=list(VARIANTS))


@each_variant
def test_a_checkpoint_round_trip_keeps_the_logits(tiny_config, tmp_path, overrides):
    model = MoEForCausalLM(tiny_config(**overrides)).eval()
    model.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), MoEConfig)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    token_BS = torch.randint(96, (2, 13))
    with torch.no_grad():
        assert torch.equal(model(token_BS).logits, loaded(token_BS).logits)


@each_variant
def test_decoding_with_a_cache_equals_the_prefill_column_by_column(tiny_config, tolerance, overrides):
    model = MoEForCausalLM(tiny_config(**overrides)).eval()
    token_BS = torch.randint(96, (2, 9))
    with torch.no_grad():
        whole = model(token_BS).logits
        cache = None
        for position in range(9):
            step = model(token_BS[:, position : position + 1], past_key_values=cache, use_cache=True)
            cache = step.past_key_values
            torch.testing.assert_close(step.logits[:, 0], whole[:, position], **tolerance[torch.float32])


def test_left_padding_does_not_change_what_is_generated(tiny_config):
    model = MoEForCausalLM(tiny_config()).eval()
    prompt = torch.randint(1, 96, (1, 7))
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), prompt], dim=1)
    batch = torch.cat([padded, torch.randint(1, 96, (1, 11))])
    mask = torch.ones_like(batch)
    mask[0, :4] = 0
    alone = model.generate(prompt, max_new_tokens=6, do_sample=False)[0, 7:]
    together = model.generate(batch, attention_mask=mask, max_new_tokens=6, do_sample=False)[0, 11:]
    assert torch.equal(alone, together)


def test_padding_is_not_counted_by_the_router(tiny_config):
    model = MoEForCausalLM(tiny_config()).eval()
    token_BS = torch.randint(96, (2, 6))
    mask = torch.ones_like(token_BS)
    mask[0, :4] = 0
    stats = model(token_BS, attention_mask=mask).router_stats
    assert [int(layer.count_R.sum()) for layer in stats] == [8 * 2] * 3


def test_the_future_does_not_leak_into_the_past(tiny_config):
    model = MoEForCausalLM(tiny_config()).eval()
    first, second = torch.randint(96, (1, 12)), torch.randint(96, (1, 12))
    second[:, :6] = first[:, :6]
    with torch.no_grad():
        torch.testing.assert_close(model(first).logits[:, :6], model(second).logits[:, :6])


def test_every_parameter_gets_a_gradient(tiny_config):
    model = MoEForCausalLM(tiny_config(**VARIANTS["zero-compute"], num_shared_experts=1)).train()
    token_BS = torch.randint(96, (4, 30))
    model(token_BS, labels=token_BS).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_auxiliary_losses_join_the_loss_in_training_only(tiny_config):
    model = MoEForCausalLM(tiny_config(balance_loss_weight=1.0)).train()
    token_BS = torch.randint(96, (2, 8))
    output = model(token_BS, labels=token_BS)
    assert output.loss > output.lm_loss + 0.9
    model.eval()
    output = model(token_BS, labels=token_BS)
    assert output.loss == output.lm_loss


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"router": "nope"}, "unknown router"),
        ({"qk_norm": "rows"}, "qk_norm"),
        ({"zero_compute_experts": ["noise"]}, "zero_compute_experts"),
        ({"num_dense_layers": 3}, "num_dense_layers"),
        ({"num_key_value_heads": 3}, "multiple"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(tiny_config, overrides, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**overrides)


def test_unknown_router_options_are_refused_with_the_known_ones(tiny_config):
    with pytest.raises(ValueError, match=r"known are .*renormalise"):
        MoEForCausalLM(tiny_config(router_options={"temperature": 2}))
