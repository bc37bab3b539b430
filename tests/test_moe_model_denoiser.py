"""Denoisers under EDM, MoDE's conditioned attention and fused experts, and decentralised mixtures of denoisers."""

import math

import pytest
import torch

from moe import DecentralisedDenoiser, Denoiser, PartitionRouter, fused_experts, nearest_parts, noise_levels, sample
from moe.model.denoiser import noised

MODE = {"architecture": "mode", "router": "qwen3_moe", "vocab_size": 1, "num_experts": 4}


@pytest.fixture
def denoiser(tiny_config):
    torch.manual_seed(3)
    config = tiny_config(**MODE, architecture_options={"attends": True, "samples": False})
    return Denoiser(config, width=2).double().eval()


def test_a_denoiser_is_the_identity_without_noise_and_forgets_its_input_in_much(denoiser):
    x = torch.randn(3, 5, 2).double()
    low, high = (torch.full((3,), level).double() for level in (1e-6, 1e6))
    torch.testing.assert_close(denoiser(x, low), x, atol=1e-4, rtol=0)
    inner, _ = denoiser.run(x / (1e12 + 0.25) ** 0.5, high)
    torch.testing.assert_close(denoiser(x, high), 0.5 * inner, atol=1e-5, rtol=0)


def test_preconditioning_and_loss_equal_the_formulas_with_every_gradient(denoiser, tolerance):
    clean = torch.randn(4, 3, 2).double()
    ours = denoiser.loss(clean, torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(5)
    expected = 0.0
    sigma_B = (torch.randn(4, generator=generator) * 1.2 - 1.2).exp().double()
    noise = torch.randn(4, 3, 2, generator=generator).double()
    for b in range(4):
        s, x = float(sigma_B[b]), clean[b] + sigma_B[b] * noise[b]
        inner, _ = denoiser.run((x / math.sqrt(s * s + 0.25))[None], sigma_B[b : b + 1])
        made = 0.25 / (s * s + 0.25) * x + s * 0.5 / math.sqrt(s * s + 0.25) * inner[0]
        expected = expected + (s * s + 0.25) / (s * 0.5) ** 2 * ((made - clean[b]) ** 2).mean() / 4
    torch.testing.assert_close(ours, expected, **tolerance[torch.float64])
    parameters = [p for name, p in denoiser.named_parameters() if "embed_tokens" not in name]
    for a, b in zip(*(torch.autograd.grad(loss, parameters) for loss in (ours, expected)), strict=True):
        torch.testing.assert_close(a, b, **tolerance[torch.float64])


def test_fused_experts_denoise_what_routed_ones_do_and_are_made_once_per_level(denoiser, tolerance):
    noise, levels = torch.randn(3, 4, 2).double(), noise_levels(5)
    routed = sample(denoiser, noise, levels)
    with fused_experts(denoiser) as cache:
        torch.testing.assert_close(sample(denoiser, noise, levels), routed, **tolerance[torch.float64])
        assert cache.misses == 5 * 3
        sample(denoiser, noise, levels)
        assert cache.misses == 5 * 3, "levels are fixed by the sampler, so a policy's next call finds all of them"


def test_attention_reads_the_condition_and_a_zero_condition_is_none(tiny_config):
    from moe import MoEForCausalLM

    options = {"attends": True, "reads": "token_and_condition"}
    model = MoEForCausalLM(tiny_config(architecture="mode", architecture_options=options)).double().eval()
    token_BS, zero = torch.randint(0, 96, (2, 5)), torch.zeros(2, 32).double()
    with torch.no_grad():
        plain = model(token_BS).logits
        assert torch.equal(model(token_BS, condition=zero).logits, plain)
        for layer in model.model.moe_layers:
            layer.router.inner[:, 32:] = 0  # what is left of the condition is what attention reads
        assert not torch.allclose(model(token_BS, condition=zero + 1).logits, model(token_BS).logits)
    with pytest.raises(ValueError, match="num_dense_layers must be 0"):
        MoEForCausalLM(tiny_config(architecture="mode", architecture_options=options, num_dense_layers=1))


def test_noise_levels_by_hand():
    assert noise_levels(1) == [pytest.approx(80.0), 0.0]
    two = noise_levels(3, largest=8.0, smallest=1.0, bend=3.0)
    assert two == pytest.approx([8.0, 1.5**3, 1.0, 0.0])
    with pytest.raises(ValueError, match="at least 1 step"):
        noise_levels(0)


def test_sampling_with_the_true_denoiser_of_a_gaussian_gives_its_deviation():
    """Of N(0, d^2): D(x, s) = x d^2 / (d^2 + s^2), and the flow scales by d / sqrt(d^2 + s^2)."""
    noise = torch.randn(1, 1, 4).double()
    made = sample(lambda x, s: x * 9 / (9 + s[:, None, None] ** 2), noise, noise_levels(2000, smallest=1e-4))
    torch.testing.assert_close(made, noise * 80 * 3 / (9 + 6400) ** 0.5, rtol=1e-2, atol=0)


CENTRES, SHARES = torch.tensor([-2.0, 0.5, 3.0]).double(), torch.tensor([0.5, 0.2, 0.3]).double()


def of_part(part):
    """The best denoiser of N(centre, 0.25) in each coordinate."""
    return lambda x, s: (x * 0.25 + CENTRES[part] * s[:, None, None] ** 2) / (0.25 + s[:, None, None] ** 2)


def true_posterior(x, s):
    """Logarithms of share times density of the noisy sequence, per part."""
    variance = (0.25 + s**2)[:, None]
    square = ((x[:, None] - CENTRES[None, :, None, None]) ** 2).sum(dim=(2, 3))
    return SHARES.log() - square / (2 * variance)


def test_members_of_the_parts_under_the_true_router_are_the_best_denoiser_of_all_data():
    """The expectation of the clean value over a fine grid of clean values, by brute force."""
    x, s = torch.randn(6, 1, 1).double() * 3, torch.rand(6).double() * 2 + 0.1
    ours = DecentralisedDenoiser([of_part(part) for part in range(3)], true_posterior)(x, s)
    grid = torch.linspace(-12, 12, 40001).double()
    density = sum(p * torch.exp(-((grid - c) ** 2) / 0.5) for p, c in zip(SHARES, CENTRES, strict=True))
    for b in range(6):
        weight = density * torch.exp(-((x[b] - grid) ** 2) / (2 * s[b] ** 2)).flatten()
        torch.testing.assert_close(ours[b, 0, 0], (weight * grid).sum() / weight.sum(), rtol=1e-6, atol=1e-8)


def test_one_member_is_the_model_and_only_members_that_are_used_run(denoiser):
    x, s = torch.randn(4, 3, 2).double(), torch.rand(4).double() + 0.1
    with torch.no_grad():
        alone = DecentralisedDenoiser([denoiser], lambda x, s: torch.zeros(len(x), 1).double())
        assert torch.equal(alone(x, s), denoiser(x, s))
        choice = torch.tensor([[0.0, 9, 1], [9, 0, 1], [0, 9, 1], [0, 1, 9]]).double()
        members = [of_part(part) for part in range(3)]
        best = DecentralisedDenoiser(members, lambda x, s: choice, members_used=1)
        for b, part in enumerate((1, 0, 1, 2)):
            torch.testing.assert_close(best(x, s)[b], members[part](x[b : b + 1], s[b : b + 1])[0])
        assert best.runs == [4, 8, 4], "four calls, each sequence through one member"
    with pytest.raises(ValueError, match=r"members_used must lie in 1\.\.3; got 4"):
        DecentralisedDenoiser(members, true_posterior, members_used=4)


def test_the_router_learns_the_parts(tiny_config):
    config = tiny_config(vocab_size=1, architecture="mode", router="qwen3_moe", num_hidden_layers=1)
    router = PartitionRouter(config, width=1, num_members=3).train()
    optimizer = torch.optim.AdamW(router.parameters(), lr=3e-3)
    generator, losses = torch.Generator().manual_seed(0), []
    for _ in range(60):
        part_B = torch.randint(0, 3, (64,), generator=generator)
        clean = CENTRES.float()[part_B][:, None, None] + 0.5 * torch.randn(64, 2, 1, generator=generator)
        loss = router.loss(clean, part_B, generator)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-10:]) / 10 < 0.5 * sum(losses[:5]) / 5
    noisy, sigma = noised(clean, generator)
    assert router.eval()(noisy, sigma).shape == (64, 3)


def test_parts_are_the_clusters_of_the_data():
    x = torch.cat([torch.randn(20, 3) * 0.1 + centre for centre in (5.0, -5.0, 0.0)])
    assert nearest_parts(x, 3).tolist() == [0] * 20 + [1] * 20 + [2] * 20
    assert nearest_parts(x, 1).tolist() == [0] * 60
    with pytest.raises(ValueError, match="the rows; got 61"):
        nearest_parts(x, 61)
