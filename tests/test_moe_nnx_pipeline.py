"""The pipeline of three functions: by hand on one device; on four devices, loss and gradients of one."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("jax", reason="needs the extra expertier[jax]")

import jax
import jax.numpy as jnp
import optax

from moe.nnx import Pipeline
from moe.nnx.parts.mesh import partition_by_shape

ROOT = Path(__file__).parent.parent
EXAMPLES = [(float(x), 3.0 * x) for x in range(10)]


def collate(examples):
    return {"x": np.array([x for x, _ in examples], np.float32), "y": np.array([y for _, y in examples], np.float32)}


def squared_error(params, batch, key):
    noise = 0.0 if key is None else params["noise"] * jax.random.normal(key)
    return ((params["slope"] * batch["x"] + noise - batch["y"]) ** 2).mean()


def line(noise=0.0, seed=0):
    return Pipeline(
        {"slope": jnp.float32(1.0), "noise": jnp.float32(noise)},
        collate=collate,
        loss=squared_error,
        predict=lambda params, batch: {"y": params["slope"] * batch["x"]},
        optimizer=optax.sgd(0.01),
        seed=seed,
    )


def test_a_step_by_hand_and_answers_in_order():
    pipeline = line()
    # (w x - 3 x)^2 with w = 1: the mean of 4 x^2 over 1, 2 is 10, and its slope by w is the mean of -4 x^2
    assert pipeline.evaluate(EXAMPLES[1:3]) == pytest.approx(10.0)
    assert pipeline.step(EXAMPLES[1:3]) == pytest.approx(10.0)
    assert float(pipeline.params["slope"]) == pytest.approx(1.1)
    answers = pipeline.predict(EXAMPLES, batch_size=4)["y"]
    np.testing.assert_allclose(answers, 1.1 * np.arange(10), rtol=1e-6)
    assert pipeline.done == 1


def test_a_restored_pipeline_goes_on_bit_by_bit_with_the_same_order_and_noise(tmp_path):
    whole, first = line(noise=0.1), line(noise=0.1)
    losses = whole.fit(EXAMPLES, batch_size=4, epochs=3)
    assert len(losses) == 6
    begun = first.fit(EXAMPLES, batch_size=4, epochs=1)
    first.save(tmp_path / "state.safetensors")
    second = line(noise=5.0)
    second.restore(tmp_path / "state.safetensors")
    assert begun + second.fit(EXAMPLES, batch_size=4, epochs=3) == losses


def test_what_does_not_fit_is_refused(tmp_path):
    pipeline = line()
    with pytest.raises(ValueError, match="a batch of 11 needs as many examples; got 10"):
        pipeline.fit(EXAMPLES, batch_size=11)
    with pytest.raises(ValueError, match="no examples"):
        pipeline.predict([], batch_size=2)
    pipeline.save(tmp_path / "state.safetensors")
    other = Pipeline(
        {"slope": jnp.ones(2)},
        collate=collate,
        loss=squared_error,
        predict=lambda params, batch: batch,
        optimizer=optax.sgd(0.01),
    )
    with pytest.raises(ValueError, match="does not fit this model"):
        other.restore(tmp_path / "state.safetensors")


@pytest.mark.parametrize(
    ("path", "shape", "expected"),
    [
        (("dense", "kernel"), (16, 32), (None, "tensor")),
        (("dense", "kernel"), (32, 16), ("tensor", None)),
        (("dense", "kernel"), (16, 16), (None, "tensor")),
        (("o_proj", "kernel"), (16, 16), ("tensor", None)),
        (("dense", "kernel"), (16, 33), ("tensor", None)),
        (("dense", "kernel"), (15, 33), (None, None)),
        (("dense", "bias"), (16,), (None,)),
        (("experts", "up"), (8, 16, 32), ("expert", None, "tensor")),
        (("experts", "down"), (8, 32, 16), ("expert", "tensor", None)),
        (("experts", "up"), (3, 16, 32), (None, None, "tensor")),
        (("router", "kernel"), (16, 32), (None, None)),
        (("scale",), (), ()),
    ],
)
def test_the_rule_of_shapes_by_hand(path, shape, expected):
    class TwoByTwo:
        shape = {"data": 1, "expert": 2, "tensor": 2}  # noqa: RUF012 (what a mesh of 4 devices says)

    assert tuple(partition_by_shape(path, shape, TwoByTwo())) == expected


ON_FOUR_DEVICES = """
import sys, tempfile
import warnings; warnings.simplefilter("error")
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np, optax
from flax import linen, nnx
from moe import MoEConfig
from moe.nnx import MoEForCausalLM, Pipeline, build_mesh, distribute
from moe.nnx.parts.mesh import partition, partition_by_shape

assert len(jax.devices()) == 4
DOCUMENTS = list(np.random.default_rng(0).integers(0, 32, (10, 12)))

class Own(linen.Module):
    @linen.compact
    def __call__(self, tokens):
        x = linen.Embed(32, 16)(tokens)
        attend = linen.MultiHeadDotProductAttention(num_heads=4)
        x = x + attend(linen.LayerNorm()(x), mask=linen.make_causal_mask(tokens))
        return linen.Dense(32)(x + linen.Dense(16)(linen.gelu(linen.Dense(64)(linen.LayerNorm()(x)))))

def own(mesh):
    model = Own()
    params = model.init(jax.random.key(0), jnp.zeros((1, 12), jnp.int32))["params"]
    def loss(params, batch, key):
        scores = model.apply({"params": params}, batch[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(scores, batch[:, 1:]).mean()
    return params, loss, lambda params, batch: model.apply({"params": params}, batch)[:, -1], partition_by_shape

def ours(mesh):
    sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=24, moe_intermediate_size=12, num_hidden_layers=1,
                 num_attention_heads=4, num_key_value_heads=2, head_dim=4, num_experts=4, num_experts_per_tok=2)
    model = MoEForCausalLM(MoEConfig(**sizes), nnx.Rngs(0))
    if mesh is not None:
        distribute(model, mesh)
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    def loss(params, batch, key):
        return nnx.merge(graph, params, rest)(batch, batch, is_training=key is not None, key=key).loss
    return params, loss, lambda params, batch: nnx.merge(graph, params, rest)(batch).logits[:, -1], partition

def pipeline(build, mesh):
    params, loss, predict, rule = build(mesh)
    # with this rate a step subtracts the gradient itself
    functions = dict(collate=np.stack, loss=loss, predict=predict)
    return Pipeline(params, **functions, optimizer=optax.sgd(1.0), mesh=mesh, rule=rule)

def after_a_step(one):
    before = jax.tree.map(np.asarray, one.params)
    loss = one.step(DOCUMENTS[:8])
    gradient = jax.tree.map(lambda old, new: old - np.asarray(new), before, one.params)
    return loss, gradient, one.predict(DOCUMENTS, batch_size=8)

def error(found, right):
    return float(np.linalg.norm(found - right) / max(np.linalg.norm(right), 1e-3))

for build, meshes in ((own, [dict(data=4), dict(data=2, tensor=2), dict(tensor=4)]), (ours, [dict(data=2, expert=2)])):
    loss, gradient, answers = after_a_step(pipeline(build, None))
    for sizes in meshes:
        many = pipeline(build, build_mesh(**sizes))
        split = [leaf for leaf in jax.tree.leaves(many.params) if not leaf.sharding.is_fully_replicated]
        assert bool(split) == (sizes != dict(data=4)), sizes
        found_loss, found, found_answers = after_a_step(many)
        assert abs(found_loss - loss) < 1e-6 * abs(loss), (sizes, loss, found_loss)
        worst = max(jax.tree.leaves(jax.tree.map(error, found, gradient)))
        assert worst < 1e-4, (build, sizes, worst)
        assert error(found_answers, answers) < 1e-4
        path = Path(tempfile.mkdtemp()) / "state.safetensors"
        many.save(path)
        again = pipeline(build, None)
        again.restore(path)
        assert all(jax.tree.leaves(jax.tree.map(np.array_equal, many.params, again.params)))
        try:
            many.step(DOCUMENTS[:7])
        except ValueError as refused:
            assert sizes.get("data", 1) > 1 and "7 examples do not divide" in str(refused)
"""


@pytest.mark.slow
def test_loss_gradients_and_answers_on_four_devices_are_those_of_one():
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    script = [sys.executable, "-c", ON_FOUR_DEVICES]
    done = subprocess.run(script, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
