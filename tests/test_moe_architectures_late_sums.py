"""Ladder and shortcut: recurrences by loops with every gradient, and where they are the plain model."""

import pytest
import torch

from moe import MoEForCausalLM
from moe.layers.layer import FeedForward
from moe.parts.attention import rotary_angles
from routing import Carry, RoutingContext


def model_of(tiny_config, architecture, **more):
    return MoEForCausalLM(tiny_config(architecture=architecture, num_shared_experts=1, **more)).double().eval()


def modules_of(model, token_BS):
    """Attention and feed-forward of every layer, each a function of the stream, and the embedded tokens."""
    decoder = model.model
    _, S = token_BS.shape
    angles = rotary_angles(torch.arange(S)[None], decoder.config.head_dim, decoder.config.rope_theta)
    found = []
    for layer in decoder.layers:

        def attend(x, layer=layer):
            return layer.self_attn(layer.input_layernorm(x), angles, None, None)

        def feed(x, layer=layer):
            normed = layer.post_attention_layernorm(x)
            if isinstance(layer.mlp, FeedForward):
                return layer.mlp(normed)
            context = RoutingContext(token_id_T=token_BS.flatten())
            y_TD, *_ = layer.mlp(normed.flatten(0, 1), Carry(), context)
            return y_TD.view_as(x)

        found.append((attend, feed, isinstance(layer.mlp, FeedForward)))
    return found, decoder.embed_tokens(token_BS)


def expect_same(model, token_BS, x_BSD, tolerance):
    ours = model(token_BS, use_cache=False).logits
    expected = model.lm_head(model.model.norm(x_BSD))
    torch.testing.assert_close(ours, expected, **tolerance[torch.float64])
    inputs, seed = list(model.parameters()), torch.randn_like(ours)
    found = [torch.autograd.grad((y * seed).sum(), inputs, allow_unused=True) for y in (ours, expected)]
    assert any(gradient is not None for gradient in found[0])
    for a, b in zip(*found, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, **tolerance[torch.float64])


@pytest.mark.parametrize("dense", [0, 1])
def test_a_ladder_equals_the_recurrence_over_modules_with_every_gradient(dense, tiny_config, tolerance):
    model, token_BS = model_of(tiny_config, "ladder", num_dense_layers=dense), torch.randint(96, (2, 7))
    layers, x_BSD = modules_of(model, token_BS)
    before, now = x_BSD, x_BSD
    for module in [module for attend, feed, _ in layers for module in (attend, feed)]:
        before, now = now, now + module(before)
    expect_same(model, token_BS, now, tolerance)


@pytest.mark.parametrize("dense", [0, 1])
def test_a_shortcut_equals_the_recurrence_over_layers_with_every_gradient(dense, tiny_config, tolerance):
    model, token_BS = model_of(tiny_config, "shortcut", num_dense_layers=dense), torch.randint(96, (2, 7))
    layers, x_BSD = modules_of(model, token_BS)
    late = 0.0
    for attend, feed, is_dense in layers:
        x_BSD = x_BSD + attend(x_BSD) + late
        late = feed(x_BSD)
        if is_dense:
            x_BSD, late = x_BSD + late, 0.0
    expect_same(model, token_BS, x_BSD + late, tolerance)


@pytest.mark.parametrize("architecture", ["ladder", "shortcut"])
def test_without_attention_nothing_is_late(architecture, tiny_config, tolerance):
    late, plain = model_of(tiny_config, architecture), model_of(tiny_config, "moe")
    plain.load_state_dict(late.state_dict())
    token_BS = torch.randint(96, (2, 9))
    with torch.no_grad():
        assert not torch.allclose(late(token_BS).logits, plain(token_BS).logits)
        for model in (late, plain):
            for layer in model.model.layers:
                layer.self_attn.o_proj.weight.zero_()
        torch.testing.assert_close(late(token_BS).logits, plain(token_BS).logits, **tolerance[torch.float64])
