"""Published initialisations of router weights, and those that are options."""

import pytest
import torch

from moe import MoEForCausalLM
from routing import RouterSizes, build_routers

D, E = 512, 64


def weight_of(name, zero_compute=(), top_k=2, **options):
    sizes = RouterSizes(width=D, num_experts=E, top_k=top_k, num_layers=1, zero_compute=zero_compute)
    router = build_routers(name, sizes, options)[0]
    router.init_parameters(0.02)
    return router.weight.detach()


def test_switch_is_truncated_at_two_sigma_of_a_tenth_of_the_inverse_width():
    weight, std = weight_of("switch", top_k=1), (0.1 / D) ** 0.5
    assert 1.9 * std < weight.abs().max() <= 2 * std
    # a normal cut at two sigma keeps 0.8796 of its standard deviation
    assert weight.std().item() == pytest.approx(0.8796 * std, rel=0.02)


def test_olmoe_is_truncated_at_three_sigma_of_the_models_range():
    weight = weight_of("olmoe")
    assert 0.05 < weight.abs().max() <= 0.06
    assert weight.std().item() == pytest.approx(0.9866 * 0.02, rel=0.02)


def test_kaiming_with_a_sqrt_5_is_uniform_within_the_inverse_root_of_the_width():
    weight, bound = weight_of("deepseek_v3", init="kaiming"), D**-0.5
    assert 0.99 * bound < weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)


def test_init_scale_sets_the_variance_of_a_normal_too():
    assert weight_of("classic", init_scale=0.5).std().item() == pytest.approx((0.5 / D) ** 0.5, rel=0.02)


def test_null_rows_may_start_as_noisy_copies_and_survive_saving(tiny_config, tmp_path):
    weight = weight_of("adamoe", ("zero",) * (2 * E), null_copy_noise=1e-2)
    copies = weight[:E].repeat(2, 1)
    assert not torch.equal(weight[E:], copies), "exact twins would tie"
    torch.testing.assert_close(weight[E:], copies, atol=2e-3, rtol=0)
    model = MoEForCausalLM(
        tiny_config(router="adamoe", router_options={"null_copy_noise": 0.1}, zero_compute_experts=["zero"] * 6)
    )
    model.save_pretrained(tmp_path)
    again = MoEForCausalLM.from_pretrained(tmp_path)
    for before, after in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init": "orthogonal"}, "init must be one of normal, truncated, kaiming"),
        ({"init": "kaiming", "init_scale": 0.1}, "leave init_scale out"),
        ({"init_cut": 0.0}, "init_cut must be positive"),
        ({"null_copy_noise": -0.1}, "must not be negative"),
        ({"null_copy_noise": 0.1, "zero_compute": ("zero",) * 3}, r"multiples of 64 \(E\); got 3"),
    ],
)
def test_bad_initialisations_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        weight_of("classic", **options)


def test_rmoe_starts_as_torchs_own_layers_if_asked(tiny_config):
    """Uniform within 1 / sqrt(inputs) for all of its matrices, and 0 for the cell's biases."""
    options = {"init": "kaiming", "state_width": 64}
    model = MoEForCausalLM(tiny_config(router="rmoe", router_options=options))
    first, *others = model.model.routers
    matrices = {"projection": 32, "weight": 64}
    for router in (first, *others):
        for name, inputs in matrices.items():
            assert getattr(router, name).abs().max().item() == pytest.approx(inputs**-0.5, rel=0.02)
    for name in ("weight_ih", "weight_hh"):
        assert getattr(first.cell, name).abs().max().item() == pytest.approx(64**-0.5, rel=0.01)
    assert not first.cell.bias_ih.any()
    assert not first.cell.bias_hh.any()
    plain = MoEForCausalLM(tiny_config(router="rmoe", router_options={"state_width": 64}))
    assert plain.model.routers[0].cell.weight_ih.std().item() == pytest.approx(0.2, rel=0.05)
