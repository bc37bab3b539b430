"""Traps that sit between a paper and its released code, or between two conventions: one test each, named after it."""

import pytest
import torch

from moe import MoEForCausalLM, MoELayer
from routing import BALANCE_LOSSES, Carry, RouterSizes, RoutingContext, build_routers

T, D, E = 40, 8, 6


def build(name, *, top_k=2, num_experts=E, num_layers=1, zero_compute=(), **options):
    sizes = RouterSizes(width=D, num_experts=num_experts, top_k=top_k, num_layers=num_layers, zero_compute=zero_compute)
    routers = [router.double() for router in build_routers(name, sizes, options)]
    for router in routers:
        router.init_parameters(1.0)
    return routers if num_layers > 1 else routers[0]


def run(router, x_TD, **context):
    return router(x_TD, Carry(), RoutingContext(**context))


def inputs(num_tokens=T):
    return torch.randn(num_tokens, D, dtype=torch.float64)


def loss_of(stats):
    return BALANCE_LOSSES[stats.balance_loss](stats)


# --- AdaMoE ---------------------------------------------------------------------------------------------------------


def test_trap_null_average_with_an_attention_mask_leaves_padding_out():
    """Released code would mix an unmasked mean over nulls into masked loads."""
    router = build("adamoe", top_k=3, zero_compute=("zero",) * 4)
    x_TD, valid_T = inputs(), torch.arange(T) % 4 != 0
    padded, alone = run(router, x_TD, is_valid_T=valid_T)[2], run(router, x_TD[valid_T])[2]
    assert loss_of(padded) == loss_of(alone)
    assert loss_of(padded) != loss_of(run(router, x_TD)[2])


@pytest.mark.parametrize("num_experts", [2, 5, 11])
def test_trap_true_experts_are_told_by_their_number_not_by_a_fixed_index(num_experts):
    """Released code tests ids against 7 or 3."""
    router = build("adamoe", num_experts=num_experts, top_k=2, zero_compute=("zero",) * 5)
    routing, _, stats = run(router, inputs(200))
    is_true_TK = routing.expert_TK < num_experts
    assert torch.equal(routing.weight_TK > 0, is_true_TK)
    assert stats.true_load.item() == pytest.approx(is_true_TK.sum().item() / 200)


def test_trap_load_shares_sum_to_one_whatever_k_is():
    """Two published codes differ by a factor K for the same coefficient; here a doubled K doubles no loss."""
    x_TD = inputs(4000)
    losses = [loss_of(run(build("adamoe", top_k=k, zero_compute=("zero",) * 6), x_TD)[2]).item() for k in (2, 4, 8)]
    assert max(losses) < 1.3 * min(losses)


def test_trap_exact_twin_rows_tie_and_noisy_ones_do_not():
    router = build("adamoe", zero_compute=("zero",) * E, null_copy_noise=0.0)
    _, _, stats = run(router, inputs())
    assert torch.equal(stats.logit_TR[:, :E], stats.logit_TR[:, E:]), "which twin top-k takes is arbitrary"
    router = build("adamoe", zero_compute=("zero",) * E, null_copy_noise=1e-3)
    _, _, stats = run(router, inputs())
    assert (stats.logit_TR[:, :E] != stats.logit_TR[:, E:]).all()


# --- copy experts ---------------------------------------------------------------------------------------------------


def test_trap_copy_adds_the_normed_input_not_the_residual_stream(tiny_config):
    config = tiny_config(
        router="longcat",
        zero_compute_experts=["copy"] * 8,
        num_experts_per_tok=3,
        num_hidden_layers=1,
        initializer_range=0.02,
    )
    layer = MoELayer(config, build_routers("longcat", config.router_sizes)[0]).eval()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    layer.router.bias_R[:6] -= 10.0  # only copies are chosen
    x_TD = torch.randn(5, 32)
    y_TD, _, (stats,) = layer(x_TD, Carry(), RoutingContext())
    torch.testing.assert_close(y_TD, stats.kept.weight_TK.sum(dim=1, keepdim=True) * x_TD)
    # what a layer is given is normed: the same stream at another scale gives the same copies
    model = MoEForCausalLM(config).eval()
    received = []
    model.model.moe_layers[0].register_forward_pre_hook(lambda _, given: received.append(given[0].detach()))
    token_BS = torch.arange(6)[None]
    model(token_BS)
    torch.testing.assert_close(received[0].square().mean(dim=-1), torch.ones(received[0].shape[:-1]), atol=0.05, rtol=0)


def test_trap_raw_gates_shrink_what_copies_add():
    """Un-normalised weights of copies sum to less than 1, so the output shrinks with them; scale restores it."""
    x_TD = inputs(200)
    sums = []
    for scale in (1.0, 6.0):
        torch.manual_seed(1)
        routing, _, _ = run(build("longcat", top_k=3, zero_compute=("copy",) * 6, scale=scale), x_TD)
        sums.append(routing.weight_TK.sum(dim=1))
    assert (sums[0] < 1).all()
    torch.testing.assert_close(sums[1], 6 * sums[0])


# --- MoE++ ----------------------------------------------------------------------------------------------------------


def test_trap_expert_inputs_are_not_multiplied_by_k(tiny_config):
    """Released code multiplies the tokens by K in place unless a flag is set: the caller's tensor changes."""
    config = tiny_config(router="moepp", zero_compute_experts=["copy", "zero"], num_hidden_layers=1)
    layer = MoELayer(config, build_routers("moepp", config.router_sizes)[0]).eval()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x_TD = torch.randn(400, 32)
    before = x_TD.clone()
    y_TD, _, (stats,) = layer(x_TD, Carry(), RoutingContext())
    assert torch.equal(x_TD, before)
    only_copy_T = ((stats.kept.expert_TK == 6) | (stats.kept.expert_TK == 7)).all(dim=1)
    assert only_copy_T.any()
    torch.testing.assert_close(y_TD[only_copy_T], x_TD[only_copy_T])


def test_trap_gating_residual_starts_small_not_as_a_default_linear():
    """The published map starts as a default linear layer, as large as the gate itself; the paper gives no start."""
    routers = build_routers("moepp", RouterSizes(width=D, num_experts=32, top_k=2, num_layers=2))
    for router in routers:
        router.init_parameters(0.02)
    assert routers[1].residual_weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert 32**-0.5 / 3**0.5 > 5 * 0.02, "what a default linear layer would have"


# --- top-1, Switch's factor, training-only lots ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "learns"),
    [("mixtral", False), ("qwen3_moe", False), ("adamoe", False), ("rmoe", False), ("olmoe", True), ("switch", True)],
)
def test_trap_top_1_with_normalised_weights_has_no_gradient(name, learns):
    router = build(name, top_k=1)
    routing, _, _ = run(router, inputs())
    assert (routing.weight_TK == 1).all() is not learns
    if routing.weight_TK.requires_grad:
        routing.weight_TK.sum().backward()
    gradient = router.weight.grad
    assert bool(gradient is not None and gradient.abs().max() > 1e-12) is learns


def test_trap_switch_loss_of_sigma_moe_has_the_factor_of_switch():
    """Its repository's `switch` regulariser omits it; here the same name gives the same loss for every router."""
    x_TD = inputs()
    sigma, plain = build("sigma_moe", balance_loss="switch"), build("olmoe")
    with torch.no_grad():
        plain.weight.copy_(sigma.weight)
    stats = run(sigma, x_TD)[2]
    share_R = stats.count_R / (2 * T)
    torch.testing.assert_close(loss_of(stats), E * (share_R * stats.probability_R).sum())


@pytest.mark.parametrize("name", ["sigma_moe", "gshard", "sinkhorn", "switch"])
def test_trap_lots_and_balancing_are_for_training_only(name):
    """Dropout, jitter, second-choice lots, capacity and batch-wide balancing must not reach evaluation."""
    router = build(name, top_k=1 if name == "switch" else 2)
    x_TD = inputs(200) + 1
    first, second = run(router, x_TD)[0], run(router, x_TD)[0]
    one_by_one = torch.cat([run(router, x_TD[t : t + 1])[0].expert_TK for t in range(20)])
    assert torch.equal(first.expert_TK, second.expert_TK)
    assert torch.equal(first.expert_TK[:20], one_by_one)
    assert (first.expert_TK < E).all()


def test_trap_random_capacity_is_drawn_in_training_only():
    router = build("olmoe", capacity_factor=0.5, capacity_policy="random")
    x_TD = inputs(200)
    kept = [run(router, x_TD, is_training=True)[0].expert_TK < E for _ in range(2)]
    assert not torch.equal(*kept)
    assert (run(router, x_TD)[0].expert_TK < E).all()


def test_trap_capacity_is_that_of_the_batch_not_of_what_chance_left():
    """GShard's capacity is 2 cf T / E; second choices that lost their lot must not shrink it."""
    router = build("gshard", num_experts=2, capacity_factor=0.5)
    with torch.no_grad():
        router.weight.zero_()
        router.weight[0, 0] = 1.0
    x_TD = torch.zeros(100, D, dtype=torch.float64)
    x_TD[:, 0] = 4.0  # everyone prefers expert 0, and keeps expert 1 with probability 0.04
    _, _, stats = run(router, x_TD, is_training=True)
    assert stats.kept_R[0] == 50, "2 * 0.5 * 100 / 2"


def test_trap_loss_in_double_precision_is_not_capped_at_single():
    """Integer counts divide to float32 by default, which would round the shares of a float64 model."""
    router = build("olmoe", top_k=1, num_experts=3)
    _, _, stats = run(router, inputs(7))
    exact = sum(count / 7 * p for count, p in zip(stats.count_R.tolist(), stats.probability_R.tolist(), strict=True))
    assert loss_of(stats).item() == pytest.approx(3 * exact, rel=1e-14)
