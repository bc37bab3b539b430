"""Attention of one token in C: torch's bits at every length that is tried here."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from offload.compute.layers.attending import attended, attends_like_torch
from offload.compute.layers.structs import Heads
from offload.compute.orders import orders

SHAPES = [(2, 1, 128), pytest.param(4, 2, 64, marks=pytest.mark.slow), pytest.param(2, 2, 80, marks=pytest.mark.slow)]
LENGTHS = (*range(1, 67), 100, 127, 257, 510, 511, 512, 513, 520, 1023, 1024, 1025, 1100)


@pytest.fixture(autouse=True)
def _kernel(several_threads):
    several_threads(1)
    try:
        orders()
    except OSError:
        pytest.skip("no C compiler")
    if not attends_like_torch(Heads(4, 2, 64), 0.125):
        pytest.skip("torch's order is not known on this processor")


@pytest.mark.parametrize(("heads", "shared", "width"), SHAPES)
def test_bits_are_those_of_torch_at_every_length(heads, shared, width):
    generator, most = torch.Generator().manual_seed(7), max(LENGTHS)
    numbers = [torch.randn(1, count, most, width, generator=generator) for count in (heads, shared, shared)]
    cancelling = numbers[1].clone()
    cancelling[..., width // 2 :] = -cancelling[..., : width // 2]
    even = torch.cat([numbers[0][:, :, :1, : width // 2]] * 2, dim=-1)
    for positions in LENGTHS:
        values = numbers[2][:, :, most - positions :].clone()
        values[:, :, positions // 2 : positions // 2 * 2] = -values[:, :, : positions // 2]
        for query, keys, scale in ((numbers[0][:, :, :1], numbers[1], width**-0.5), (even, cancelling, 3e5)):
            shown = keys.bfloat16()[:, :, :positions], values.bfloat16()
            found = attended(Heads(heads, shared, width, scale), query.bfloat16().contiguous(), *shown)
            expected = scaled_dot_product_attention(query.bfloat16(), *shown, scale=scale, enable_gqa=shared < heads)
            assert torch.equal(found, expected), (positions, scale)


def test_equal_scores_give_the_mean_of_the_values():
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 9.0]]).bfloat16()[None, None]
    query, keys = torch.zeros(1, 1, 1, 2).bfloat16(), torch.randn(1, 1, 3, 2).bfloat16()
    assert attended(Heads(1, 1, 2, 1.0), query, keys, values).tolist() == [[[[3.0, 5.0]]]]
