"""Prices, thresholds, hashed choices and the loss of the global batch: against a linear programme, by hand, by V4."""

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HashRouter, DeepseekV4TopKRouter

from moe import MoEForCausalLM
from routing import BALANCE_LOSSES, Carry, RouterSizes, RoutingContext, build_routers
from routing.choice.normalise import log_sqrt_softplus, sqrt_softplus
from routing.routers.own_rules.prices import balancing_prices

D, E, K = 8, 6, 2


def build(name, num_layers=1, **options):
    sizes = RouterSizes(width=D, num_experts=E, top_k=K, num_layers=num_layers, vocab_size=96)
    routers = build_routers(name, sizes, options)
    for router in routers:
        router.init_parameters(1.0)
    return routers


def optimum(score_TR, top_k):
    """The largest summed score of K choices per token with at most T K / R per expert, by a linear programme."""
    T, R = score_TR.shape
    per_token, per_expert = np.kron(np.eye(T), np.ones(R)), np.kron(np.ones(T), np.eye(R))
    found = linprog(
        -score_TR.numpy().ravel(),
        A_ub=per_expert,
        b_ub=np.full(R, T * top_k / R),
        A_eq=per_token,
        b_eq=np.full(T, top_k),
        bounds=(0, 1),
    )
    return -found.fun


@pytest.mark.parametrize("is_signed", [False, True])
def test_prices_balance_a_batch_at_nearly_the_best_score(is_signed):
    torch.manual_seed(1)
    score_TR = (torch.randn(60, E) + torch.arange(E) / 2).softmax(dim=-1)
    greedy = score_TR.topk(K).indices.flatten().bincount(minlength=E)
    price_R = balancing_prices(score_TR, torch.zeros(E), K, rounds=40, is_signed=is_signed)
    chosen_TK = (score_TR - price_R).topk(K).indices
    count = chosen_TK.flatten().bincount(minlength=E)
    assert greedy.max() > 30
    assert count.max() <= 22, "20 are even"
    reached = float(score_TR.gather(1, chosen_TK).sum())
    assert reached >= 0.97 * optimum(score_TR, K)
    assert is_signed or (price_R >= 0).all()


def test_prices_of_a_step_serve_later_calls_and_no_weight_has_one():
    (router,) = build("bip")
    x_TD = torch.randn(60, D) + 1
    routing, _, _ = router(x_TD, Carry(), RoutingContext(is_training=True))
    assert not router.price_R.any()
    router.post_step(routing.count_R, 60)
    assert router.price_R.any()
    later, _, _ = router(x_TD, Carry(), RoutingContext())
    probability_TE = (x_TD @ router.weight.T).softmax(dim=-1)
    assert torch.equal(later.expert_TK, (probability_TE - router.price_R).topk(K).indices)
    torch.testing.assert_close(later.weight_TK, probability_TE.gather(1, later.expert_TK))


def test_thresholds_reach_k_experts_per_token_and_choice_does_not_see_the_batch():
    (router,) = build("threshold", kept_share=0.9)
    for _ in range(30):
        x_TD = torch.randn(200, D)
        routing, _, _ = router(x_TD, Carry(), RoutingContext(is_training=True))
        router.post_step(routing.count_R, 200)
    x_TD = torch.randn(2000, D)
    routing, _, _ = router(x_TD, Carry(), RoutingContext())
    assert routing.count_R.sum() / 2000 == pytest.approx(K, rel=0.1)
    is_chosen_TE = (x_TD @ router.weight.T).sigmoid() > router.threshold_R
    assert torch.equal(routing.count_R, is_chosen_TE.sum(dim=0))
    with pytest.raises(ValueError, match=r"kept_share must lie in 0\.\.1"):
        build("threshold", kept_share=1.0)


def weights_of_chosen(name, router, x, ids):
    """One token's weights, number by number from the formulas of its router."""
    logits = [sum(w * value for w, value in zip(router.weight[e], x, strict=True)) for e in range(E)]
    exponentials = [logit.exp() for logit in logits]
    if name == "bip":
        return [exponentials[e] / sum(exponentials) for e in ids]
    if name == "deepseek_v4":
        scores = [(1 + exponentials[e]).log().sqrt() for e in ids]
        return [1.5 * score / sum(scores) for score in scores]
    return [1 / (1 + (-logits[e]).exp()) for e in ids]


@pytest.mark.parametrize("name", ["bip", "quantile", "threshold", "deepseek_v4"])
def test_weights_and_every_gradient_are_those_of_a_loop_over_the_chosen(name, tolerance):
    """Prices, thresholds and tables choose; no gradient passes through them."""
    router = build(name, num_layers=2)[0].double()
    x_TD = torch.randn(12, D).double().requires_grad_()
    context = RoutingContext(is_training=True, token_id_T=torch.arange(12) * 5)
    routing, _, _ = router(x_TD, Carry(), context)
    upstream_TE = torch.randn(12, E).double()
    ours = expected = 0.0
    for t, ids in enumerate(routing.expert_TK.tolist()):
        chosen = [(slot, e) for slot, e in enumerate(ids) if e < E]
        wanted = weights_of_chosen(name, router, x_TD[t], [e for _, e in chosen])
        for (slot, e), weight in zip(chosen, wanted, strict=True):
            torch.testing.assert_close(routing.weight_TK[t, slot], weight, **tolerance[torch.float64])
            ours = ours + upstream_TE[t, e] * routing.weight_TK[t, slot]
            expected = expected + upstream_TE[t, e] * weight
    found = torch.autograd.grad(ours, [x_TD, router.weight], retain_graph=True)
    for a, b in zip(found, torch.autograd.grad(expected, [x_TD, router.weight]), strict=True):
        torch.testing.assert_close(a, b, **tolerance[torch.float64])


def test_the_first_thresholds_are_the_quantiles_of_the_first_batch():
    (router,) = build("threshold")
    x_TD = torch.randn(30, D)
    routing, _, _ = router(x_TD, Carry(), RoutingContext(is_training=True))
    router.post_step(routing.count_R, 30)
    expected = np.quantile((x_TD @ router.weight.T).sigmoid().detach().numpy(), 1 - K / E, axis=0)
    torch.testing.assert_close(router.threshold_R, torch.from_numpy(expected).float())


def test_deepseek_v4_routes_as_transformers_does():
    config = DeepseekV4Config(
        hidden_size=D, num_local_experts=E, num_experts_per_tok=K, vocab_size=96, routed_scaling_factor=1.5
    )
    hashed, scored = build("deepseek_v4", num_layers=2)
    x_TD, token_T = torch.randn(20, D), torch.arange(20) * 3
    theirs = DeepseekV4HashRouter(config)
    theirs.weight.data, theirs.tid2eid = hashed.weight.data, hashed.expert_VK
    _, weight_TK, expert_TK = theirs(x_TD, token_T)
    ours, _, _ = hashed(x_TD, Carry(), RoutingContext(token_id_T=token_T))
    assert torch.equal(ours.expert_TK, expert_TK)
    torch.testing.assert_close(ours.weight_TK, weight_TK)

    plain = DeepseekV4TopKRouter(config)
    plain.weight.data, plain.e_score_correction_bias = scored.weight.data, torch.randn(E)
    scored.bias_R.copy_(plain.e_score_correction_bias)
    _, weight_TK, expert_TK = plain(x_TD)
    ours, _, _ = scored(x_TD, Carry(), RoutingContext())
    order, other = ours.expert_TK.argsort(dim=1), expert_TK.argsort(dim=1)
    assert torch.equal(ours.expert_TK.gather(1, order), expert_TK.gather(1, other))
    torch.testing.assert_close(ours.weight_TK.gather(1, order), weight_TK.gather(1, other))


def test_hashed_layers_are_planned_by_the_first_one(tiny_config):
    model = MoEForCausalLM(tiny_config(router="deepseek_v4", router_options={"hash_layers": 3})).eval()
    plans, asked = {}, []
    for module in model.modules():
        if hasattr(module, "exact_plan"):
            module.register_forward_hook(lambda m, inputs, result: plans.update(m.exact_plan(result, *inputs)))
    for layer in model.model.moe_layers:
        layer.experts.register_forward_pre_hook(lambda _m, inputs: asked.append(inputs[1]))
    model(torch.randint(96, (1, 5)))
    assert sorted(plans) == [1, 2]
    assert all(torch.equal(plans[layer], asked[layer]) for layer in plans)
    with pytest.raises(ValueError, match="hash_layers must be at most 3"):
        MoEForCausalLM(tiny_config(router="deepseek_v4", router_options={"hash_layers": 4}))


def test_sqrt_softplus_has_finite_values_and_gradients_everywhere():
    z = torch.tensor([-300.0, -100.0, -20.0, -1.0, 0.0, 3.0, 90.0], dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(sqrt_softplus(z)[2:], z[2:].exp().log1p().sqrt())
    (slope,) = torch.autograd.grad(sqrt_softplus(z).sum(), z)
    assert slope.isfinite().all()
    assert torch.autograd.gradcheck(sqrt_softplus, z[3:].detach().requires_grad_())
    torch.testing.assert_close(log_sqrt_softplus(z[:1]), z[:1] / 2)


def test_the_global_batch_loss_has_the_loads_of_the_last_step():
    (router,) = build("classic", balance_loss="global_batch")
    x_TD = torch.randn(12, D)
    _, _, first = router(x_TD, Carry(), RoutingContext(is_training=True))
    torch.testing.assert_close(BALANCE_LOSSES["global_batch"](first), BALANCE_LOSSES["switch"](first))
    router.post_step(torch.tensor([30, 0, 0, 10, 0, 0]), 20)
    _, _, second = router(x_TD, Carry(), RoutingContext(is_training=True))
    expected = E * (0.75 * second.probability_R[0] + 0.25 * second.probability_R[3])
    torch.testing.assert_close(BALANCE_LOSSES["global_batch"](second), expected)
    (plain,) = build("olmoe")
    _, _, stats = plain(x_TD, Carry(), RoutingContext())
    with pytest.raises(ValueError, match="keeps the step's loads"):
        BALANCE_LOSSES["global_batch"](stats)
