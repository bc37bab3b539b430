"""The Flax twin against the torch model: the same checkpoint gives the same logits, losses and gradients."""

import numpy as np
import pytest
import torch

from moe import MoEForCausalLM

jax = pytest.importorskip("jax", reason="needs the extra expertier[jax]")
nnx = pytest.importorskip("flax.nnx", reason="needs the extra expertier[jax]")

from moe.nnx import load_pretrained  # noqa: E402
from moe.nnx.model.checkpoint import _outwards  # noqa: E402

NULLS = {"zero_compute_experts": ["zero"] * 3, "num_experts_per_tok": 4}
VARIANTS = {
    "top2": {"router": "mixtral"},
    "olmoe-dense-shared": {"num_hidden_layers": 3, "num_dense_layers": 1, "num_shared_experts": 2},
    "qwen3-tied": {"router": "qwen3_moe", "tie_word_embeddings": True, "qk_norm": "none", "qkv_bias": True},
    "deepseek-v3": {"router": "deepseek_v3", "router_options": {"num_groups": 3, "groups_kept": 2}, "qk_norm": "full"},
    "deepseek-v2": {
        "router": "deepseek_v2",
        "num_experts_per_tok": 3,
        "router_options": {"num_groups": 3, "groups_kept": 2, "device_weight": 0.7, "communication_weight": 0.4},
    },
    "adamoe": {"router": "adamoe", **NULLS},
    "longcat": {"router": "longcat", "zero_compute_experts": ["copy"] * 2},
    "moepp": {"router": "moepp", "zero_compute_experts": ["zero", "copy", "constant", "constant"]},
    "rmoe": {"router": "rmoe", "router_options": {"state_width": 12}},
    "rmoe-detached": {"router": "rmoe", "router_options": {"state_width": 12, "recurrence": "detach"}},
    "pregate": {"router": "pregate", "num_hidden_layers": 3},
    "pregate-rmoe": {"router": "pregate", "router_options": {"inner": "rmoe", "inner_options": {"state_width": 12}}},
    "switch": {"router": "switch", "num_experts_per_tok": 1, "router_options": {"jitter": 0.0}},
    "tutel": {"router": "classic", "router_options": {"capacity_factor": 1.0, "capacity_rule": "tutel"}},
    "priority": {
        "router": "classic",
        "router_options": {"capacity_factor": 0.7, "capacity_policy": "priority", "balance_loss": "first_choice"},
    },
    "weight": {"router": "classic", "router_options": {"capacity_factor": 0.7, "capacity_policy": "weight"}},
    "entropy": {"router": "classic", "router_options": {"score": "sigmoid", "balance_loss": "entropy"}},
    "sqrt-softplus": {
        "router": "classic",
        "router_options": {
            "score": "sqrt_softplus",
            "renormalise": True,
            "bias_rate": 1e-3,
            "balance_loss": "sequence",
        },
    },
}
LONGER = (
    "pregate",
    "top2",
    "deepseek-v3",
    "moepp",
    "deepseek-v2",
    "adamoe",
    "switch",
    "olmoe-dense-shared",
    "qwen3-tied",
    "longcat",
    "rmoe-detached",
    "pregate-rmoe",
    "tutel",
    "priority",
    "weight",
    "entropy",
    "sqrt-softplus",
)
each_variant = pytest.mark.parametrize(
    "overrides",
    [pytest.param(v, id=name, marks=[pytest.mark.slow] if name in LONGER else []) for name, v in VARIANTS.items()],
)


def pair(tiny_config, folder, overrides):
    """A torch model with lively router states, and its twin."""
    model = MoEForCausalLM(tiny_config(**{"num_hidden_layers": 2, "balance_loss_weight": 0.5} | overrides))
    for name, buffer in model.named_buffers():
        if name.endswith("bias_R"):
            torch.nn.init.normal_(buffer, std=0.1)
    model.save_pretrained(folder)
    return model, load_pretrained(folder)


def outputs(twin, token_BS, mask_BS):
    """Logits of an evaluation with padding; loss and gradients, by checkpoint key, of a training pass."""
    graph, params, variables = nnx.split(twin, nnx.Param, ...)

    @jax.jit
    def run(params):
        def loss(params):
            return nnx.merge(graph, params, variables)(token_BS, token_BS, is_training=True).loss

        padded = nnx.merge(graph, params, variables)(token_BS, attention_mask=mask_BS)
        return padded.logits, *jax.value_and_grad(loss)(params)

    logits, loss, gradient = run(params)
    gradients = dict(_outwards(path, np.asarray(leaf[...])) for path, leaf in nnx.to_flat_state(gradient))
    return np.asarray(logits), float(loss), gradients


@each_variant
def test_logits_losses_and_gradients_equal_those_of_torch(tiny_config, tmp_path, tolerance, overrides):
    model, twin = pair(tiny_config, tmp_path, overrides)
    token_BS = torch.randint(96, (3, 11))
    mask_BS = torch.ones_like(token_BS)
    mask_BS[0, :4] = 0
    logits, loss, gradients = outputs(twin, token_BS.numpy(), mask_BS.numpy())

    with torch.no_grad():
        padded = model.eval()(token_BS, attention_mask=mask_BS)
    is_valid = mask_BS.bool().numpy()
    np.testing.assert_allclose(logits[is_valid], padded.logits.numpy()[is_valid], atol=1e-5, rtol=1e-5)

    trained = model.train()(token_BS, labels=token_BS)
    trained.loss.backward()
    np.testing.assert_allclose(loss, trained.loss.item(), rtol=1e-5)
    truths = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    for name in gradients.keys() - truths.keys():
        assert not gradients[name].any(), f"{name} has a gradient here only"
    for name, truth in truths.items():
        np.testing.assert_allclose(gradients[name], truth, **tolerance[torch.float32], err_msg=name)


@pytest.mark.slow
def test_padding_is_not_counted_by_the_router(tiny_config, tmp_path):
    model, twin = pair(tiny_config, tmp_path, {"router": "deepseek_v3"})
    token_BS = torch.randint(96, (2, 6))
    mask_BS = torch.ones_like(token_BS)
    mask_BS[0, :4] = 0
    theirs = model.train()(token_BS, attention_mask=mask_BS).router_stats
    ours = twin(token_BS.numpy(), attention_mask=mask_BS.numpy(), is_training=True).router_stats
    for one, other in zip(ours, theirs, strict=True):
        assert one.chosen.count_R.tolist() == other.count_R.tolist()
        np.testing.assert_allclose(one.probability_R, other.probability_R.detach(), rtol=1e-5)
        np.testing.assert_allclose(one.entropy, other.entropy, rtol=1e-5)


@pytest.mark.slow
def test_padding_counts_in_no_device_loss(tiny_config, tmp_path):
    options = {"num_groups": 3, "groups_kept": 2}
    model, twin = pair(tiny_config, tmp_path, {"router": "deepseek_v2", "router_options": options})
    token_BS = torch.randint(96, (2, 6))
    mask_BS = torch.ones_like(token_BS)
    mask_BS[0, :4] = 0
    theirs = model.train()(token_BS, attention_mask=mask_BS).router_stats
    ours = twin(token_BS.numpy(), attention_mask=mask_BS.numpy(), is_training=True).router_stats
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one.penalty, other.penalty_T.detach().mean(), rtol=1e-5)


def test_the_balancing_bias_moves_as_in_torch_and_is_no_parameter(tiny_config, tmp_path):
    for number, overrides in enumerate(
        ({"router": "loss_free"}, {"router": "longcat", "zero_compute_experts": ["copy"] * 2})
    ):
        model, twin = pair(tiny_config, tmp_path / str(number), overrides)
        count_LR = torch.randint(9, (2, model.config.router_sizes.num_routable))
        model.model.post_step(count_LR, 20)
        twin.post_step(count_LR.numpy())
        for ours, theirs in zip(twin.model.moe_layers, model.model.moe_layers, strict=True):
            np.testing.assert_array_equal(ours.router.bias_R[...], theirs.router.bias_R.numpy())
        assert not any("bias_R" in path for path, _ in nnx.to_flat_state(nnx.state(twin, nnx.Param)))


def test_a_pregated_block_hands_its_counts_to_the_gate_that_decided(tiny_config, tmp_path):
    options = {"ahead": 1, "inner": "loss_free"}
    model, twin = pair(tiny_config, tmp_path, {"router": "pregate", "router_options": options})
    count_LR = torch.randint(9, (2, 6))
    model.model.post_step(count_LR, 20)
    twin.post_step(count_LR.numpy())
    blocks = zip(twin.model.moe_layers, model.model.moe_layers, strict=True)
    (first, their_first), _ = blocks
    for name in ("own_gate", "pre_gate"):
        np.testing.assert_array_equal(
            getattr(first.router, name).bias_R[...], getattr(their_first.router, name).bias_R.numpy()
        )


def test_a_router_without_a_twin_is_refused_by_name(tiny_config):
    from moe.nnx import MoEForCausalLM as Twin

    with pytest.raises(ValueError, match=r"'remoe'.*no JAX twin"):
        Twin(tiny_config(router="remoe"), nnx.Rngs(0))
    with pytest.raises(ValueError, match="hidden_act"):
        Twin(tiny_config(hidden_act="tanh"), nnx.Rngs(0))


@pytest.mark.parametrize(("init", "bound"), [("kaiming", 16**-0.5), ("normal", None)])
def test_rmoe_starts_as_its_option_says(tiny_config, init, bound):
    from moe.nnx.routing.routers import build_twins

    options = {"state_width": 16, "init": init}
    routers = build_twins(tiny_config(router="rmoe", router_options=options), nnx.Rngs(0))
    weights = [routers[0].weight, routers[0].cell.weight_ih, routers[0].cell.weight_hh]
    if bound:
        assert all(0.9 * bound < abs(weight[...]).max() <= bound for weight in weights)
        assert 0.9 * 32**-0.5 < abs(routers[0].projection[...]).max() <= 32**-0.5
    else:
        assert all(abs(weight[...]).max() > 0.4 for weight in weights[1:]), "normal with the tiny model's 0.2"
