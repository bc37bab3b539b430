"""Logits at the edge of float32: every router gives finite weights and gradients, and refuses what is no number."""

import logging
import math

import pytest
import torch

from moe import MoEForCausalLM
from routing import RouterSizes, RoutingContext, auxiliary_loss, build_routers
from routing.choice.normalise import LEAST_SUM, as_shares, normalised
from routing.choice.top_k import top_experts
from routing.routers.classic.balanced import _scaled_logarithms, balanced_assignment, sinkhorn
from routing.routers.constant_weights import warn_of_constant_weights
from tests.test_routing_contract import CASES, E, T, build, context_of

D, L = 8, 3
# hash and forced have no logits
WITH_LOGITS = sorted(name for name in CASES if CASES[name].router not in ("hash", "forced"))
# what is added to the logits of the routable experts, in turn
SHIFTS = {
    "-100": [-100.0],
    "-1e4": [-1e4],
    "+1e4": [1e4],
    "mixed": [-1e4, 1e4, -100.0, 0.0],
    "one forbidden": [-math.inf] + [0.0] * (E - 1),
    "one left": [-1e4] * (E - 1) + [1e4],
}


def shifted(name, shift, is_training):
    """Weights, statistics and gradients of all layers under a bias, in float32."""
    routers = build(CASES[name], torch.float32)
    R = routers[0].sizes.num_routable if hasattr(routers[0], "sizes") else routers[0]._deciding[0].sizes.num_routable
    bias_LR = torch.tensor(SHIFTS[shift]).repeat(R)[:R].expand(L, R)
    x_LTD = torch.randn(L, T, D, requires_grad=True)
    context, stats, total = context_of(is_training=is_training, logit_bias_LR=bias_LR), [], 0.0
    carry = routers[0].begin(context)
    for router, x_TD in zip(routers, x_LTD, strict=True):
        routing, carry, layer = router(x_TD, carry, context)
        stats.append(layer)
        total = total + (routing.validate().weight_TK * torch.randn_like(routing.weight_TK)).sum()
    loss = total + auxiliary_loss(stats, balance_weight=1.0, z_weight=1e-3)
    loss.backward()
    gradients = [x_LTD.grad] + [p.grad for router in routers for p in router.parameters() if p.grad is not None]
    return stats, loss, gradients


@pytest.mark.parametrize("is_training", [False, True])
@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("name", WITH_LOGITS)
def test_weights_losses_and_gradients_are_finite(name, shift, is_training):
    if CASES[name].router == "base" and is_training and shift == "one forbidden":
        pytest.skip("refused: an even assignment needs every expert")
    stats, loss, gradients = shifted(name, shift, is_training)
    assert loss.isfinite()
    for layer in stats:
        assert layer.probability_TR.isfinite().all()
        assert layer.entropy.isfinite()
        for routing in (layer.chosen, layer.kept):
            assert routing.weight_TK.isfinite().all()
            assert all(len({e for e in row if e != routing.empty_id}) == sum(e != routing.empty_id for e in row)
                       for row in routing.expert_TK.tolist())  # fmt: skip
    assert all(gradient.isfinite().all() for gradient in gradients)


# --- the same numbers where nothing vanishes, the right ones where it does ------------------------------------------


def test_quotients_that_were_exact_keep_their_bits():
    score_TK = torch.rand(64, 6) * 10 ** torch.linspace(-18, 0, 64)[:, None]
    assert torch.equal(normalised(score_TK, lambda: 1 / 0), score_TK / score_TK.sum(dim=-1, keepdim=True))
    with_small = torch.cat([score_TK, torch.zeros(1, 6)])
    by_logarithms = torch.full_like(with_small, 1 / 6)
    assert torch.equal(normalised(with_small, lambda: by_logarithms)[:-1], normalised(score_TK, lambda: 1 / 0))


@pytest.mark.parametrize("router", ["deepseek_v3", "loss_free", "sigma_moe"])
@pytest.mark.parametrize("low", [-30.0, -44.0, -46.0, -88.0, -100.0, -1e4])
def test_vanishing_sigmoids_equal_those_of_double_precision(router, low):
    """On both sides of the sum from which on logarithms are used, which is near -44.4 - log(E)."""
    sizes = RouterSizes(width=D, num_experts=E, top_k=2, num_layers=1)
    single, double = (build_routers(router, sizes, {"renormalise": True})[0] for _ in range(2))
    x_TD, results = torch.randn(T, D), []
    x_TD[:, 0] = 1.0
    single.init_parameters(0.5)
    with torch.no_grad():
        single.weight[:, 0] = low
        double.weight.copy_(single.weight)
    for one, dtype in ((single, torch.float32), (double, torch.float64)):
        weight_RD = one.weight.detach().to(dtype).requires_grad_()
        logit_TR = x_TD.to(dtype) @ weight_RD.T
        scores = one.score(logit_TR)
        expert_TK = logit_TR.detach().float().topk(2, dim=-1).indices
        weight_TK = one.weigh(scores, expert_TK)
        ((weight_TK * torch.tensor([1.0, 3.0])).sum() + scores.probability_TR.square().sum()).backward()
        results.append((weight_TK, scores.probability_TR, weight_RD.grad[:, 1:]))
    # a logit of -1e4 in float32 is off by up to 5e-4 itself
    tolerance = {"rtol": 5e-3, "atol": 2e-2} if low < -1e3 else {"rtol": 2e-4, "atol": 2e-4}
    for ours, truth in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), truth, **tolerance)
    torch.testing.assert_close(results[0][1].sum(dim=-1), torch.ones(T))


@pytest.mark.parametrize("router", ["deepseek_v3", "loss_free", "sigma_moe"])
def test_one_token_that_no_expert_wants_spoils_no_training_step(router, tiny_config):
    model = MoEForCausalLM(tiny_config(router=router)).train()
    token_BS, seen = torch.randint(0, 96, (2, 12)), {}
    gate = model.model.moe_layers[0].router
    hook = gate.register_forward_hook(lambda module, args, out: seen.update(x_TD=args[0].detach()))
    model(token_BS)
    hook.remove()
    with torch.no_grad():
        gate.weight.copy_(-150 * seen["x_TD"][5] / seen["x_TD"][5].square().sum())
    output = model(token_BS, labels=token_BS)
    output.loss.backward()
    assert output.loss.isfinite()
    assert output.router_stats[0].logit_TR[5].max() < -140
    assert output.router_stats[0].entropy.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_what_capacity_left_is_shared_out_without_an_overflow():
    weight_TK = torch.tensor([[0.3, 0.1], [0.0, 0.0], [1e-30, 3e-30], [1e-37, 0.0]], requires_grad=True)
    share_TK = as_shares(weight_TK)
    expected = torch.tensor([[0.75, 0.25], [0.0, 0.0], [0.25, 0.75], [1.0, 0.0]])
    torch.testing.assert_close(share_TK, expected)
    (share_TK * torch.tensor([1e3, -1e3])).sum().backward()
    assert weight_TK.grad.isfinite().all()
    assert weight_TK.grad[0].any()
    assert not weight_TK.grad[2:].any(), "below the least sum the shares count as constants"
    assert weight_TK[2:].sum() < LEAST_SUM


@pytest.mark.parametrize("spread", [1.0, 1e2, 1e4])
def test_doubly_normalised_scores_stay_finite_and_normalised(spread):
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        logit_TR = torch.randn(32, 8, generator=generator) * spread
        logit_TR[:, seed % 8] -= 10 * spread
        plan_TR = sinkhorn(logit_TR)
        assert plan_TR.isfinite().all()
        torch.testing.assert_close(plan_TR.sum(dim=1), torch.full((32,), 1 / 32))


def test_doubly_normalised_by_logarithms_is_the_same_plan():
    logit_TR = torch.randn(32, 8, dtype=torch.float64)
    by_logarithms = _scaled_logarithms(logit_TR - logit_TR.amax(dim=1, keepdim=True), 1e-12, 1000).exp()
    torch.testing.assert_close(by_logarithms, sinkhorn(logit_TR, tolerance=1e-12))


# --- what is no number ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_score_that_is_no_number_is_chosen_last_and_nobody_twice(dtype):
    score_TR = torch.randn(2000, 8, dtype=dtype)
    score_TR[torch.rand(2000, 8) < 0.4] = torch.nan
    expert_TK = top_experts(score_TR, 4)
    assert all(len(set(row)) == 4 for row in expert_TK.tolist())
    numbers_T = (~score_TR.isnan()).sum(dim=1)
    chosen_T = (~score_TR.gather(1, expert_TK).isnan()).sum(dim=1)
    assert torch.equal(chosen_T, numbers_T.clamp_max(4))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bias_that_is_no_number_is_refused(value, tiny_config):
    model, bias_LR = MoEForCausalLM(tiny_config(router="olmoe")), torch.zeros(3, 6)
    bias_LR[1, 2] = value
    with pytest.raises(ValueError, match="logit_bias_LR must be numbers, or -inf"):
        model(torch.randint(0, 96, (1, 4)), logit_bias_LR=bias_LR)


def test_a_bias_that_forbids_every_expert_of_a_layer_is_refused():
    with pytest.raises(ValueError, match="a layer of -inf alone"):
        RoutingContext(logit_bias_LR=torch.tensor([[0.0, 0.0], [-math.inf, -math.inf]]))


@pytest.mark.parametrize("count", [math.nan, math.inf, -1.0])
@pytest.mark.parametrize("router", ["loss_free", "longcat", "remoe"])
def test_counts_that_are_no_numbers_move_no_buffer(router, count):
    one = build(CASES[router])[0]
    before = {name: buffer.clone() for name, buffer in one.named_buffers()}
    count_R = torch.ones(one.sizes.num_routable)
    count_R[0] = count
    with pytest.raises(ValueError, match="must be finite and not negative; got"):
        one.post_step(count_R, 10)
    assert all(torch.equal(buffer, before[name]) for name, buffer in one.named_buffers())


def test_an_even_assignment_of_what_is_no_number_is_refused_in_our_words():
    for value in (math.nan, -math.inf):
        with pytest.raises(ValueError, match="needs finite logits"):
            balanced_assignment(torch.tensor([[1.0, value], [0.0, 1.0]]))


# --- one expert per token -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("router", "options", "is_constant"),
    [
        ("mixtral", {}, True),
        ("qwen3_moe", {}, True),
        ("deepseek_v3", {}, True),
        ("rmoe", {"state_width": 4}, True),
        ("switch", {}, False),
        ("loss_free", {}, False),
    ],
)
def test_a_constant_weight_is_said_once(router, options, is_constant, logged):
    warn_of_constant_weights.cache_clear()
    for top_k in (1, 2, 1):
        build_routers(router, RouterSizes(width=D, num_experts=E, top_k=top_k, num_layers=L), options)
    found = [record for record in logged if record.levelno == logging.WARNING]
    assert len(found) == is_constant
    if is_constant:
        assert "gives the router no gradient" in found[0].getMessage()


def test_more_than_one_expert_per_token_says_nothing(logged):
    warn_of_constant_weights.cache_clear()
    build_routers("mixtral", RouterSizes(width=D, num_experts=E, top_k=2, num_layers=L))
    assert not logged
