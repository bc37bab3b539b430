"""Soft MoE against a plain loop through the whole layer; not causal, and says so."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from moe import MoEForCausalLM
from moe.experts.reference import swiglu_experts_reference
from moe.layers.layer import SoftMoELayer
from routing import Carry, RouterSizes, RoutingContext, build_routers

D, E, S, P = 32, 6, 5, 2


def layer_of(tiny_config):
    config = tiny_config(router="soft_moe", num_hidden_layers=1)
    router = build_routers("soft_moe", config.router_sizes, {"slots_per_expert": P})[0]
    layer = SoftMoELayer(config, router).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer


def softmax(values):
    exp = [v.exp() for v in values]
    return [v / sum(exp) for v in exp]


def test_layer_and_every_gradient_equal_the_plain_loop(tiny_config, tolerance):
    layer = layer_of(tiny_config)
    x_TD = torch.randn(2 * S, D, dtype=torch.float64, requires_grad=True)
    y_TD, _, (stats,) = layer(x_TD, Carry(), RoutingContext(sequence_T=torch.arange(2).repeat_interleave(S)))
    price_TD = torch.randn(2 * S, D, dtype=torch.float64)
    (y_TD * price_TD).sum().backward()
    assert stats.count_R.tolist() == [2 * P] * E

    copy = {name: p.detach().clone().requires_grad_() for name, p in layer.named_parameters()}
    x = x_TD.detach().clone().requires_grad_()
    rows = []
    for b in range(2):
        tokens = [x[b * S + s] for s in range(S)]
        slots = [copy["router.weight"][q] for q in range(E * P)]
        logit = [[copy["router.scale"][0] * (t / t.norm()) @ (q / q.norm()) for q in slots] for t in tokens]
        outputs = []
        for q in range(E * P):
            take = softmax([logit[s][q] for s in range(S)])
            mixed = sum(take[s] * tokens[s] for s in range(S))
            one = (torch.tensor([[q // P]]), torch.ones(1, 1, dtype=torch.float64))
            outputs.append(
                swiglu_experts_reference(mixed[None], *one, copy["experts.gate_up_proj"], copy["experts.down_proj"])[0]
            )
        rows += [sum(w * y for w, y in zip(softmax(logit[s]), outputs, strict=True)) for s in range(S)]
    reference = torch.stack(rows)
    torch.testing.assert_close(y_TD, reference, **tolerance[torch.float64])
    (reference * price_TD).sum().backward()
    torch.testing.assert_close(x_TD.grad, x.grad, **tolerance[torch.float64])
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.grad, copy[name].grad, **tolerance[torch.float64])


def test_padding_reaches_no_slot_and_reads_none(tiny_config):
    layer = layer_of(tiny_config)
    x_TD = torch.randn(S, D, dtype=torch.float64)
    valid_T = torch.tensor([True, True, False, True, False])
    padded, _, _ = layer(x_TD, Carry(), RoutingContext(is_valid_T=valid_T))
    alone, _, _ = layer(x_TD[valid_T], Carry(), RoutingContext())
    torch.testing.assert_close(padded[valid_T], alone)
    assert not padded[~valid_T].any()


def test_it_leaks_the_future_and_refuses_to_generate(tiny_config):
    layer = layer_of(tiny_config)
    x_TD = torch.randn(S, D, dtype=torch.float64)
    before, _, _ = layer(x_TD, Carry(), RoutingContext())
    x_TD[-1] += 1
    after, _, _ = layer(x_TD, Carry(), RoutingContext())
    assert (before[0] != after[0]).any()
    model = MoEForCausalLM(tiny_config(router="soft_moe"))
    with pytest.raises(ValueError, match="not causal"):
        model.generate(torch.randint(0, 96, (1, 4)), max_new_tokens=2)


def test_it_trains_and_is_saved(tiny_config, tmp_path):
    model = MoEForCausalLM(tiny_config(router="soft_moe")).train()
    token_BS = torch.randint(0, 96, (2, 12))
    output = model(token_BS, labels=token_BS)
    output.loss.backward()
    assert all(p.grad is not None and p.grad.any() for name, p in model.named_parameters() if ".router." in name)
    assert model.model.moe_layers[0].router.scale.item() == 1.0
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(token_BS).logits, model.eval()(token_BS).logits)


def test_bad_options_are_refused():
    sizes = RouterSizes(width=D, num_experts=E, top_k=1, num_layers=1)
    with pytest.raises(ValueError, match="slots_per_expert"):
        build_routers("soft_moe", sizes, {"slots_per_expert": 0})
    nulls = RouterSizes(width=D, num_experts=E, top_k=1, num_layers=1, zero_compute=("zero",))
    with pytest.raises(ValueError, match="no use for zero-compute"):
        build_routers("soft_moe", nulls)
    with pytest.raises(ValueError, match="nothing to fetch ahead"):
        build_routers("pregate", RouterSizes(width=D, num_experts=E, top_k=1, num_layers=2), {"inner": "soft_moe"})
