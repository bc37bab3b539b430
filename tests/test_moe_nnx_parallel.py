"""Parallelism on eight simulated devices, in a process of its own because jax fixes its devices at start."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("jax", reason="needs the extra expertier[jax]")

from moe.nnx import build_mesh, parse_mesh
from moe.nnx.parts.mesh import partition

ROOT = Path(__file__).parent.parent

SETUP = """
import warnings; warnings.simplefilter("error")
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from moe import MoEConfig
from moe.nnx import MoEForCausalLM, build_mesh, compute_experts, distribute
from moe.nnx.model import experts
from moe.nnx.parts import sorting
from moe.nnx.parts.mesh import place_batch

assert len(jax.devices()) == 8
SIZES = dict(vocab_size=32, hidden_size=16, intermediate_size=24, moe_intermediate_size=12, num_attention_heads=4,
             num_key_value_heads=2, head_dim=4, num_experts=8, num_experts_per_tok=2, initializer_range=0.2)
TOKENS = np.random.default_rng(0).integers(0, 32, (8, 10))

def gradients(mesh, product="block", **overrides):
    model = MoEForCausalLM(MoEConfig(**(SIZES | overrides)), nnx.Rngs(0), product=product)
    if mesh is not None:
        distribute(model, mesh)
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    tokens = place_batch(TOKENS, mesh)
    loss = lambda params: nnx.merge(graph, params, rest)(tokens, tokens, is_training=True).loss
    return jax.jit(jax.value_and_grad(loss))(params)

def difference(one, other):
    def relative(a, b):
        a, b = np.asarray(a), np.asarray(b)
        return float(np.linalg.norm(a - b) / max(np.linalg.norm(a), 1e-9))
    return max(jax.tree.leaves(jax.tree.map(relative, one, other)))
"""

MODEL = """
for overrides in {overrides}:
    loss, truth = gradients(None, **overrides)
    for sizes in {meshes}:
        for product in {products}:
            other_loss, other = gradients(build_mesh(**sizes), product, **overrides)
            assert abs(loss - other_loss) < 1e-5, (overrides, sizes, loss, other_loss)
            assert difference(truth, other) < 1e-4, (overrides, sizes, product, difference(truth, other))
"""

TRAP = """
from jax import lax

def with_argsort(expert_TK, num_experts):
    id_N = expert_TK.reshape(-1)
    row_N = jnp.argsort(id_N, stable=True)
    count_E = (id_N[:, None] == jnp.arange(num_experts)).sum(axis=0, dtype=jnp.int32)
    return sorting.Order(row_N, jnp.argsort(row_N), count_E)

def layer(x_TD, expert_TK, gate_up, down, sort, cast):
    mesh = build_mesh(expert=4)
    P = jax.sharding.PartitionSpec
    def local(x_TD, expert_TK, gate_up, down):
        if cast:
            x_TD = lax.pcast(x_TD, "expert", to="varying")
        mine = expert_TK - lax.axis_index("expert") * 2
        order = sort(jnp.where((mine >= 0) & (mine < 2), mine, 2), 2)
        x_ND = x_TD[order.row_N // 2]
        hidden = lax.ragged_dot(x_ND, gate_up, order.count_E)
        y_ND = lax.ragged_dot(jnp.tanh(hidden), down, order.count_E)
        return lax.psum(y_ND[order.place_N].reshape(len(x_TD), 2, -1).sum(axis=1), "expert")
    mapped = jax.shard_map(local, mesh=mesh, in_specs=(P(), P(), P("expert"), P("expert")), out_specs=P())
    return (mapped(x_TD, expert_TK, gate_up, down) ** 2).sum()

keys = jax.random.split(jax.random.key(0), 4)
x, ids = jax.random.normal(keys[0], (12, 4)), jax.random.randint(keys[1], (12, 2), 0, 8)
gate_up, down = jax.random.normal(keys[2], (8, 4, 6)), jax.random.normal(keys[3], (8, 6, 4))

def truth(x):
    rows = [[jnp.tanh(x[t] @ gate_up[e]) @ down[e] for e in ids[t].tolist()] for t in range(12)]
    return sum((sum(row) ** 2).sum() for row in rows)

expected = jax.grad(truth)(x)
def error(sort, cast):
    got = jax.jit(jax.grad(lambda x: layer(x, ids, gate_up, down, sort, cast)))(x)
    return float(jnp.linalg.norm(got - expected) / jnp.linalg.norm(expected))

assert error(sorting.sort_by_expert, False) < 1e-5, "our sort is typed right even without a cast"
assert error(with_argsort, True) < 1e-5, "the cast alone is enough, too"
print("trap", error(with_argsort, False))
"""


def on_eight_devices(script):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", SETUP + script], capture_output=True, text=True, cwd=ROOT, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_gradients_on_a_mesh_equal_those_of_one_device():
    overrides = [{"router": "deepseek_v3", "num_hidden_layers": 1}]
    meshes = [{"data": 2, "expert": 2, "tensor": 2}, {"expert": 8}]
    on_eight_devices(MODEL.format(overrides=overrides, meshes=meshes, products=["block"]))


@pytest.mark.slow
def test_gradients_on_every_mesh_equal_those_of_one_device():
    common = {"num_hidden_layers": 2}
    overrides = [
        common | {"router": "rmoe", "num_shared_experts": 1},
        common | {"router": "pregate", "num_dense_layers": 0},
        common | {"router": "adamoe", "zero_compute_experts": ["zero"] * 2, "num_dense_layers": 1},
        common | {"router": "switch", "router_options": {"jitter": 0.0}, "moe_intermediate_size": 15},
    ]
    meshes = [{"data": 8}, {"tensor": 8}, {"data": 2, "expert": 4}, {"expert": 2, "tensor": 4}, {"data": 2}]
    on_eight_devices(MODEL.format(overrides=overrides, meshes=meshes, products=["block", "ragged"]))


@pytest.mark.slow
def test_the_gradient_check_sees_the_argsort_trap_and_we_do_not_fall_into_it():
    relative_error = float(on_eight_devices(TRAP).split()[-1])
    # where jax has repaired its typing of argsort, nothing is left to see
    assert relative_error > 0.1 or relative_error < 1e-5


def test_argsort_is_not_used():
    for path in (ROOT / "moe" / "nnx").glob("*.py"):
        names = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
        assert "argsort" not in names, f"{path.name}: inside shard_map argsort loses gradients; use lax.sort"


@pytest.mark.slow
def test_training_on_a_mesh_resumes_bit_by_bit_and_stays_close_to_one_device():
    on_eight_devices("""
import tempfile
from pathlib import Path
from moe.nnx.training.optimisation import Optimisation
from moe.nnx.training.training import Trainer

how = Optimisation(weight_decay=0.1, betas=(0.9, 0.95), clip_norm=1.0, precision="float32", seed=0)
config = MoEConfig(**(SIZES | dict(num_hidden_layers=2, router="deepseek_v3")))
def steps(trainer, numbers):
    return [trainer.step(np.random.default_rng(n).integers(0, 32, (1, 8, 10)), 1e-3, n).loss for n in numbers]
mesh = build_mesh(data=2, expert=2, tensor=2)
one, many = Trainer(config, how), Trainer(config, how, mesh=mesh)
np.testing.assert_allclose(steps(one, range(3)), steps(many, range(3)), rtol=1e-5)
folder = Path(tempfile.mkdtemp())
many.save(folder)
resumed = Trainer(config, how, mesh=mesh)
resumed.restore(folder)
assert steps(many, range(3, 5)) == steps(resumed, range(3, 5))
kernel = resumed.model.model.layers[0].mlp.experts.gate_up_proj[...]
assert kernel.sharding.shard_shape(kernel.shape)[0] == SIZES["num_experts"] // 2
""")


@pytest.mark.parametrize(
    ("path", "shape", "expected"),
    [
        (("layers", "0", "self_attn", "q_proj", "kernel"), (16, 32), (None, "tensor")),
        (("layers", "0", "self_attn", "o_proj", "kernel"), (32, 16), ("tensor", None)),
        (("mlp", "experts", "gate_up_proj"), (8, 16, 2, 12), ("expert", None, None, "tensor")),
        (("mlp", "experts", "down_proj"), (8, 12, 16), ("expert", "tensor", None)),
        (("mlp", "router", "weight"), (8, 16), (None, None)),
        (("norm", "weight"), (16,), (None,)),
        (("lm_head", "kernel"), (16, 33), (None, None)),
    ],
)
def test_the_two_rules_by_hand(path, shape, expected):
    class TwoByTwo:
        shape = {"data": 1, "expert": 2, "tensor": 2}  # noqa: RUF012 (what a mesh of 4 devices says)

    assert tuple(partition(path, shape, TwoByTwo())) == expected


@pytest.mark.parametrize("text", ["", "data", "data=2,data=2", "rows=2", "data=-1", "data=x"])
def test_a_mesh_that_does_not_read_is_refused(text):
    with pytest.raises(ValueError, match="reads like"):
        parse_mesh(text)


def test_a_mesh_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="needs 64 devices"):
        parse_mesh("data=8,expert=8")
    with pytest.raises(ValueError, match="at least 1"):
        build_mesh(data=0)
