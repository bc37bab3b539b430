import pytest
import torch
from transformers import AutoModelForCausalLM

from moe import MoEForCausalLM
from routing import ROUTERS, ClassicRouter, RouterRow


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
    zero_compute = {"zero_compute_experts": ["zero", "copy", "constant", "constant"], "num_experts_per_tok": 3}
    model = MoEForCausalLM(tiny_config(**zero_compute, num_shared_experts=1)).train()
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
    with pytest.raises(ValueError, match=r"there are .*renormalise"):
        MoEForCausalLM(tiny_config(router_options={"temperature": 2}))


class CountingRouter(ClassicRouter):
    """A router with an exact buffer of its own, under a name that nothing else has."""

    def __init__(self, sizes, layer, rule):
        super().__init__(sizes, layer, rule)
        self.register_buffer("thresholds_of_mine", torch.full((sizes.num_routable,), 1.0009765625))
        self.register_buffer("steps_seen", torch.zeros((), dtype=torch.int64))

    def init_parameters(self, std):
        super().init_parameters(std)
        torch.nn.init.constant_(self.thresholds_of_mine, 1.0009765625)


def test_a_new_routers_exact_buffer_stays_float32_without_the_decoder_knowing(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setitem(ROUTERS, "counting", RouterRow(kind=CountingRouter))
    model = MoEForCausalLM(tiny_config(router="counting"))
    exact = torch.linspace(1.0009765625, 2, 6)
    for router in model.model.routers:
        router.thresholds_of_mine.copy_(exact)
    model.save_pretrained(tmp_path)
    for small in (model.to(torch.bfloat16), AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)):
        for router in small.model.routers:
            assert router.weight.dtype == torch.bfloat16
            assert router.thresholds_of_mine.dtype == torch.float32
            assert torch.equal(router.thresholds_of_mine, exact)


def test_no_weight_shares_the_fate_of_an_exact_buffer_by_its_name(tiny_config):
    """transformers searches for patterns: a buffer of layer 1 must not match layer 11, nor a longer name."""
    model = MoEForCausalLM(tiny_config(router="loss_free", num_hidden_layers=2))
    patterns = model._keep_in_fp32_modules_strict
    assert sorted(patterns) == sorted(
        f"{prefix}layers\\.{layer}\\.mlp\\.router\\.bias_R$" for prefix in ("", "model\\.") for layer in (0, 1)
    )
