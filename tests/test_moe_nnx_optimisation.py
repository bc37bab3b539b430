"""Muon of the JAX trainer: torch's own direction for every matrix, and AdamW's for what is none."""

from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("optax", reason="needs the extra expertier[jax]")

import jax.numpy as jnp

from experiments.train.optimisers.bank_muon import orthogonalised
from moe.nnx.training.optimisation import ADAMW_RMS, Optimisation, directions

HOW = Optimisation(weight_decay=0.5, betas=(0.9, 0.95), clip_norm=1e9, precision="float32", seed=0)
RANDOM = np.random.default_rng(0)
SHAPES = {
    "layers": {
        "self_attn": {"q_proj": {"kernel": (24, 16)}},
        "experts": {"gate_up_proj": (3, 8, 2, 12), "down_proj": (3, 12, 8)},
        "router": {"kernel": (24, 3)},
        "norm": {"weight": (24,)},
    },
    "embed_tokens": {"weight": (32, 24)},
}
"""Axes as the trainer has them: [inputs, outputs], [E, D, 2, F] and [E, F, D]."""


def drawn(shapes):
    if isinstance(shapes, tuple):
        return jnp.asarray(RANDOM.normal(size=shapes).astype(np.float32))
    return {name: drawn(inner) for name, inner in shapes.items()}


@pytest.fixture(scope="module")
def first_step():
    """Gradients, and what the first step of Muon moves against."""
    how = Optimisation(
        weight_decay=0.0, betas=(0.9, 0.95), muon_momentum=0.9, clip_norm=1e9, precision="float32", seed=0
    )
    params, gradients = drawn(SHAPES), drawn(SHAPES)
    rule = directions(how)
    return gradients, rule.update(gradients, rule.init(params), params)[0]


def muon_direction(stack: np.ndarray) -> np.ndarray:
    """Of matrices [..., outputs, inputs]."""
    scale = ADAMW_RMS * max(stack.shape[-2:]) ** 0.5
    return orthogonalised(torch.from_numpy(stack[None].copy()))[0].float().numpy() * scale


def expect_close(found, wanted):
    """Both iterate five times, torch's side in bfloat16."""
    assert np.abs(found - wanted).mean() < 0.03 * np.abs(wanted).mean()


def test_a_matrix_moves_as_in_torch(first_step):
    gradient, found = (np.asarray(tree["layers"]["self_attn"]["q_proj"]["kernel"]) for tree in first_step)
    expect_close(found.T, muon_direction(gradient.T))


def test_gate_and_up_of_every_expert_are_matrices_of_their_own(first_step):
    gradient, found = (np.asarray(tree["layers"]["experts"]["gate_up_proj"]) for tree in first_step)
    for expert in range(3):
        for half in range(2):
            expect_close(found[expert, :, half].T, muon_direction(gradient[expert, :, half].T))


def test_down_of_every_expert_is_a_matrix_of_its_own(first_step):
    gradient, found = (np.asarray(tree["layers"]["experts"]["down_proj"]) for tree in first_step)
    expect_close(found.transpose(0, 2, 1), muon_direction(gradient.transpose(0, 2, 1)))


@pytest.mark.parametrize("path", ["layers router kernel", "layers norm weight", "embed_tokens weight"])
def test_adamw_moves_what_is_no_inner_matrix(first_step, path):
    gradient, found = first_step
    for name in path.split():
        gradient, found = gradient[name], found[name]
    np.testing.assert_allclose(np.asarray(found), np.sign(np.asarray(gradient)), atol=1e-4)


@pytest.mark.parametrize("momentum", [None, 0.9])
def test_matrices_decay_and_norms_do_not(momentum):
    params = drawn(SHAPES)
    still = {"layers": {"norm": params["layers"]["norm"], "router": params["layers"]["router"]}}
    zeros = {"layers": {"norm": {"weight": jnp.zeros(24)}, "router": {"kernel": jnp.zeros((24, 3))}}}
    rule = directions(replace(HOW, muon_momentum=momentum))
    found, _ = rule.update(zeros, rule.init(still), still)
    np.testing.assert_allclose(found["layers"]["norm"]["weight"], 0.0)
    decayed = 0.5 * params["layers"]["router"]["kernel"]
    np.testing.assert_allclose(found["layers"]["router"]["kernel"], decayed, rtol=1e-6)
