"""TokenFormer and MemoryFormer: equations by loops with every gradient, growth, hashing by brute force."""

import itertools
import math

import pytest
import torch
from torch.nn.functional import gelu

from moe import MoEForCausalLM
from routing import Carry, RoutingContext


def layer_of(tiny_config, name, **options):
    config = tiny_config(architecture=name, architecture_options=options)
    return MoEForCausalLM(config).double().eval().model.moe_layers[0]


def compare(layer, x_TD, expected, tolerance):
    ours, _, stats = layer(x_TD, Carry(), RoutingContext())
    assert stats == []
    torch.testing.assert_close(ours, expected, **tolerance[torch.float64])
    inputs, seed = [x_TD, *layer.parameters()], torch.randn_like(ours)
    for a, b in zip(*(torch.autograd.grad((y * seed).sum(), inputs) for y in (ours, expected)), strict=True):
        torch.testing.assert_close(a, b, **tolerance[torch.float64])


def test_attention_to_parameters_equals_loops(tiny_config, tolerance):
    layer = layer_of(tiny_config, "tokenformer", tokens=10, first_tokens=7)
    x_TD, rows = torch.randn(4, 32).double().requires_grad_(), []
    for x in x_TD:
        score = torch.stack([key @ x for key in layer.keys])
        length = (score**2).sum().sqrt()
        rows.append(sum(gelu(s * math.sqrt(7) / length) * v for s, v in zip(score, layer.values, strict=True)))
    compare(layer, x_TD, torch.stack(rows), tolerance)


def test_new_pairs_with_keys_of_zero_change_nothing(tiny_config):
    small = layer_of(tiny_config, "tokenformer", tokens=8)
    large = layer_of(tiny_config, "tokenformer", tokens=13, first_tokens=8)
    with torch.no_grad():
        large.keys[:8], large.values[:8], large.keys[8:] = small.keys, small.values, 0.0
    x_TD = torch.randn(5, 32).double()
    with torch.no_grad():
        a, b = (layer(x_TD, Carry(), RoutingContext())[0] for layer in (small, large))
    torch.testing.assert_close(a, b)
    with pytest.raises(ValueError, match=r"first_tokens must lie in 1\.\.8"):
        layer_of(tiny_config, "tokenformer", tokens=8, first_tokens=9)


def test_hashed_tables_equal_loops_over_pieces_and_corners(tiny_config, tolerance):
    """p of a corner is its share among all corners of the cube: exp(z . corner / t) over their sum."""
    layer = layer_of(tiny_config, "memoryformer", bits=4, extra_bits=1, temperature=0.7)
    x_TD = torch.randn(3, 32).double().requires_grad_()

    def looked_up(table, x):
        y = 0.0
        for piece in range(8):
            z = x[piece * table.bits : (piece + 1) * table.bits]
            corners = [torch.tensor(signs).double() for signs in itertools.product((-1, 1), repeat=table.bits)]
            weight = torch.stack([((z * corner).sum() / 0.7).exp() for corner in corners])
            best = int(torch.stack([(z * corner).sum() for corner in corners]).argmax())
            row = sum(int(sign > 0) << place for place, sign in enumerate(corners[best].tolist()))
            y = y + weight[best] / weight.sum() * table.table[piece * 2**table.bits + row]
        return y

    rows = [looked_up(layer.second, layer.norm(looked_up(layer.first, x)[None])[0]) for x in x_TD]
    compare(layer, x_TD, torch.stack(rows), tolerance)


def test_pieces_that_do_not_divide_the_width_are_refused(tiny_config):
    with pytest.raises(ValueError, match=r"must divide hidden_size \(32\)"):
        layer_of(tiny_config, "memoryformer", bits=5)
