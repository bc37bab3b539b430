"""Levels: each makes the matrix finer, and what is stored is what the equations say."""

import pytest
import torch

from offload.codes.levels import LevelledScheme


def matrix():
    return 0.02 * torch.randn(40, 128, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["planes-64x4", "planes-32x2", "residual-2x5"])
def test_every_level_lowers_the_error_and_has_the_bytes_it_says(name):
    scheme, w_RC = LevelledScheme.named(name), matrix()
    levels = scheme.encode(w_RC)
    errors = [
        float((scheme.decode(levels[:depth], 40, 128) - w_RC).square().sum()) for depth in range(1, len(levels) + 1)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.6 * errors[0]
    for level, parts in enumerate(levels):
        assert {role: part.numel() for role, part in parts.items()} == scheme.part_bytes(level, 40, 128)
    assert scheme.name == name


def test_a_plane_adds_its_sign_times_its_scale():
    scheme, w_RC = LevelledScheme.named("planes-64x2"), matrix()
    base, plane = scheme.encode(w_RC)
    before_RC, after_RC = (scheme.decode(levels, 40, 128) for levels in ([base], [base, plane]))
    bits = torch.tensor(
        [[byte >> bit & 1 for byte in row for bit in range(8)] for row in plane["codes"].view(40, 16).tolist()]
    )
    scale_RC = plane["scales"].view(torch.bfloat16).float().view(40, 2).repeat_interleave(64, dim=1)
    assert torch.allclose(after_RC, before_RC + (2 * bits - 1) * scale_RC, atol=0)
    assert torch.equal(bits.bool(), w_RC - before_RC >= 0)


def test_a_block_of_one_rank_is_exact_where_sizes_have_one_rank():
    left, right = torch.rand(16) + 0.5, torch.rand(24) + 0.5
    sign_RC = torch.where(torch.rand(16, 24) < 0.5, -1.0, 1.0)
    w_RC = sign_RC * left[:, None] * right
    scheme = LevelledScheme("residual", 1, 1)
    assert torch.allclose(scheme.decode(scheme.encode(w_RC), 16, 24), w_RC, rtol=2**-6)


@pytest.mark.parametrize("name", ["planes-0x3", "planes-64", "blocks-1x2", "residual-1x0"])
def test_names_of_nothing(name):
    with pytest.raises(ValueError, match="names no levels"):
        LevelledScheme.named(name)
