"""Grouped products, sorting and experts in JAX against the loop over tokens."""

import numpy as np
import pytest
import torch

from moe import swiglu_experts_reference

jax = pytest.importorskip("jax", reason="needs the extra expertier[jax]")
pytest.importorskip("flax", reason="needs the extra expertier[jax]")

import jax.numpy as jnp  # noqa: E402
from einops import rearrange  # noqa: E402

from moe.nnx import GROUPED_PRODUCTS, compute_experts  # noqa: E402
from moe.nnx.parts.grouped import block_rows, default_product  # noqa: E402
from moe.nnx.parts.sorting import sort_by_expert, sort_tokens, unsort_rows  # noqa: E402

E, D, F = 6, 8, 12
ROUTINGS = {
    "typical": np.random.default_rng(0).integers(0, E, (40, 2)),
    "one-token": np.array([[1, 4]]),
    "odd": np.random.default_rng(1).integers(0, E, (63, 3)),
    "one-busy-expert": np.full((37, 1), 3),
    "empty-slots": np.array([[0, E], [E, E], [2, 1], [E, 5]]),
    "all-empty": np.full((5, 2), E),
    "beyond-empty": np.array([[0, E + 2], [E + 1, 3]]),
}


# the blocks are ours: they end where rows do; the ragged product is jax's, which gets counts only
RAGGED = ("typical", "empty-slots", "all-empty", "beyond-empty")
CORNERS = {"block": ("odd", "empty-slots", "all-empty", "beyond-empty"), "ragged": ("typical", "empty-slots")}
"""Those of `make test`; the others lie between them, and XLA compiles each for a second."""


@pytest.mark.parametrize(
    ("product", "name"),
    [
        pytest.param(product, name, marks=[] if name in CORNERS[product] else [pytest.mark.slow])
        for product, names in (("block", ROUTINGS), ("ragged", RAGGED))
        for name in names
    ],
)
def test_every_product_equals_the_reference_forward_and_backward(tolerance, product, name):
    expert_TK = ROUTINGS[name]
    x_TD, gate_up, down = torch.randn(len(expert_TK), D), torch.randn(E, 2 * F, D), torch.randn(E, D, F)
    weight_TK = torch.rand(expert_TK.shape).masked_fill(torch.from_numpy(expert_TK) >= E, 0.0)
    cotangent = torch.randn_like(x_TD)
    leaves = [leaf.requires_grad_() for leaf in (x_TD, weight_TK, gate_up, down)]
    truth = swiglu_experts_reference(x_TD, torch.from_numpy(expert_TK), weight_TK, gate_up, down)
    # a product with zeros keeps the graph when no expert is chosen
    total = (truth * cotangent).sum() + sum(0 * leaf.sum() for leaf in leaves)
    d_x, d_weight, d_gate_up, d_down = (leaf.numpy() for leaf in torch.autograd.grad(total, leaves))

    @jax.jit
    def run(x_TD, weight_TK, gate_up, down):
        def loss(*leaves):
            x_TD, weight_TK, gate_up, down = leaves
            y_TD = compute_experts(x_TD, jnp.asarray(expert_TK), weight_TK, gate_up, down, product=product)
            return (y_TD * cotangent.numpy()).sum(), y_TD

        return jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True)(x_TD, weight_TK, gate_up, down)

    arrays = [leaf.detach().numpy() for leaf in leaves]
    arrays[2] = rearrange(arrays[2], "e (two f) d -> e d two f", two=2)
    arrays[3] = rearrange(arrays[3], "e d f -> e f d")
    gradients, y_TD = run(*arrays)
    check = {**tolerance[torch.float32], "strict": True}
    np.testing.assert_allclose(y_TD, truth.detach().numpy(), **check)
    np.testing.assert_allclose(gradients[0], d_x, **check)
    is_used_TK = expert_TK < E
    np.testing.assert_allclose(gradients[1][is_used_TK], d_weight[is_used_TK], **check)
    np.testing.assert_allclose(rearrange(gradients[2], "e d two f -> e (two f) d"), d_gate_up, **check)
    np.testing.assert_allclose(rearrange(gradients[3], "e f d -> e d f"), d_down, **check)


def test_block_product_by_hand():
    x = jnp.array([[1.0], [2.0], [3.0], [4.0]])
    weight = jnp.array([[[10.0]], [[100.0]], [[1000.0]]])
    y = GROUPED_PRODUCTS["block"](x, weight, jnp.array([1, 0, 2]))
    assert y.tolist() == [[10.0], [2000.0], [3000.0], [0.0]]


def test_bfloat16_products_agree_and_weight_gradients_keep_their_dtype(tolerance):
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (50, D), jnp.bfloat16)
    weight = jax.random.normal(keys[1], (E, D, F), jnp.bfloat16)
    count = jnp.array([20, 0, 5, 1, 14, 10])
    results = {}
    for name, product in GROUPED_PRODUCTS.items():
        results[name] = jax.value_and_grad(lambda w, product=product: product(x, w, count).astype(float).sum())(weight)
    for ours, theirs in zip(*results.values(), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_allclose(ours.astype(float), theirs.astype(float), **tolerance[torch.bfloat16])


def test_rows_are_sorted_stably_and_find_back():
    expert_TK = jnp.array([[2, 0], [1, 2], [0, 3]])
    order = sort_by_expert(expert_TK, 3)
    assert order.row_N.tolist() == [1, 4, 2, 0, 3, 5]
    assert order.count_E.tolist() == [2, 1, 2]
    x_TD = jnp.array([[0.0], [1.0], [2.0]])
    x_ND = sort_tokens(x_TD, order)
    assert x_ND[:, 0].tolist() == [0, 2, 1, 0, 1, 2]
    assert unsort_rows(x_ND, order, 3)[..., 0].tolist() == [[0, 0], [1, 1], [2, 2]]


def test_the_backward_of_the_sort_gathers():
    expert_TK = jnp.array([[2, 0], [1, 2], [0, 3]])

    def loss(x_TD):
        order = sort_by_expert(expert_TK, 3)
        return (unsort_rows(jnp.sin(sort_tokens(x_TD, order)), order, 3) ** 2).sum()

    x_TD = jnp.arange(6.0).reshape(3, 2)
    assert "scatter" not in str(jax.make_jaxpr(jax.grad(loss))(x_TD))
    np.testing.assert_allclose(jax.grad(loss)(x_TD), 4 * jnp.sin(x_TD) * jnp.cos(x_TD), rtol=1e-6, atol=1e-6)


def test_defaults():
    assert (default_product("cpu"), default_product("tpu")) == ("block", "ragged")
    assert [block_rows(n, e) for n, e in ((1, 64), (1024, 64), (8192, 16), (10**6, 8))] == [16, 16, 128, 128]
