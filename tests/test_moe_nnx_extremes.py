"""The Flax twin's routers with logits at the edge of float32: finite weights and gradients, equal to torch's."""

import numpy as np
import pytest
import torch

from routing import Carry as TorchCarry
from routing import RoutingContext as TorchContext
from routing import auxiliary_loss as torch_auxiliary_loss
from routing import build_routers

jax = pytest.importorskip("jax", reason="needs the extra expertier[jax]")
nnx = pytest.importorskip("flax.nnx", reason="needs the extra expertier[jax]")

import jax.numpy as jnp  # noqa: E402

from moe.nnx.routing.assignment import RoutingContext  # noqa: E402
from moe.nnx.routing.losses import auxiliary_loss  # noqa: E402
from moe.nnx.routing.routers import build_twins  # noqa: E402

T, D, E = 24, 32, 6
CASES = {
    "olmoe": {},
    "qwen3_moe": {},
    "mixtral": {},
    "deepseek_v3": {},
    "deepseek_v3 groups": {"num_groups": 3, "groups_kept": 2},
    "loss_free": {},
    "deepseek_v2": {"num_groups": 3, "groups_kept": 2},
    "classic": {"score": "sigmoid", "renormalise": True, "capacity_factor": 0.5, "renormalise_kept": True},
    "classic entropy": {"score": "sigmoid", "balance_loss": "entropy"},
    "adamoe": {},
    "moepp": {},
}
LEVELS = {"-100": [-100.0], "-1e4": [-1e4], "+1e4": [1e4], "mixed": [-1e4, 1e4, -100.0, 0.0]}
LEVELS_OF_ALL = ("-100", "mixed")
NEAR = {"qwen3_moe": "olmoe", "mixtral": "olmoe", "loss_free": "deepseek_v3"}
"""Routers that differ from another case by an option of its class: `make test` has that one."""
EVERY = [
    pytest.param(case, level, marks=[pytest.mark.slow] if case in NEAR else [])
    for case in CASES
    for level in LEVELS
    if level in LEVELS_OF_ALL or case == "deepseek_v3"
]


@pytest.mark.parametrize(("case", "level"), EVERY)
def test_weights_losses_and_gradients_are_finite_and_those_of_torch(case, level, tiny_config):
    router, options = case.split()[0], CASES[case]
    kinds = ["zero", "copy", "constant"] if router in ("adamoe", "moepp") else []
    config = tiny_config(
        router=router, router_options=options, num_hidden_layers=1, zero_compute_experts=kinds, num_experts_per_tok=2
    )
    (twin,), (original,) = (
        build_twins(config, nnx.Rngs(0)),
        build_routers(router, config.router_sizes, options),
    )
    R = E + len(kinds)
    generator = np.random.default_rng(0)
    x_TD, weight_RD = generator.normal(size=(T, D)), 0.3 * generator.normal(size=(R, D))
    x_TD[:, 0], weight_RD[:, 0] = 1.0, np.resize(LEVELS[level], R)
    with torch.no_grad():
        original.weight.copy_(torch.tensor(weight_RD))
    twin.weight[...] = jnp.asarray(weight_RD, jnp.float32)
    price_TK = generator.normal(size=(T, 2)).astype(np.float32)

    context = RoutingContext(is_training=True, batch_size=2)

    def loss(twin):
        routing, _, stats = twin(jnp.asarray(x_TD, jnp.float32), {}, context)
        return (routing.weight_TK * price_TK).sum() + auxiliary_loss([stats], balance_weight=1.0, z_weight=0.0), routing

    (ours, routing), gradient = nnx.value_and_grad(loss, has_aux=True)(twin)
    sequence_T = torch.arange(T) // (T // 2)
    their_routing, _, stats = original(
        torch.tensor(x_TD).float(), TorchCarry(), TorchContext(is_training=True, sequence_T=sequence_T)
    )
    theirs = (their_routing.weight_TK * torch.tensor(price_TK)).sum()
    theirs = theirs + torch_auxiliary_loss([stats], balance_weight=1.0, z_weight=0.0)
    theirs.backward()
    assert np.isfinite(routing.weight_TK).all()
    assert np.isfinite(gradient["weight"][...]).all()
    np.testing.assert_array_equal(routing.expert_TK, their_routing.expert_TK.numpy())
    # logits of 1e4 are off by up to 5e-4, and two orders of summation differ by as much
    tolerance = {"rtol": 1e-2, "atol": 2e-3} if "1e4" in level or level == "mixed" else {"rtol": 1e-4, "atol": 1e-4}
    np.testing.assert_allclose(ours, theirs.item(), **tolerance)
    tolerance["atol"] *= 10
    np.testing.assert_allclose(gradient["weight"][...][:, 1:], original.weight.grad.numpy()[:, 1:], **tolerance)
