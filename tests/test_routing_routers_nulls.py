"""Nulls: AdaMoE, LongCat and MoE++ against plain loops through the whole layer; who learns and who cannot."""

import math

import pytest
import torch

from moe import MoELayer
from moe.experts.reference import swiglu_experts_reference
from routing import BALANCE_LOSSES, Carry, RouterSizes, RoutingContext, build_routers
from routing.routers.classic.nulls import copy_ffn_rows_to_nulls, expected_true_load

T, D, E = 7, 32, 6


def layer_of(tiny_config, router, kinds, top_k, **options):
    config = tiny_config(
        router=router,
        router_options=options,
        zero_compute_experts=kinds,
        num_experts_per_tok=top_k,
        num_hidden_layers=1,
    )
    routers = build_routers(router, config.router_sizes, options)
    layer = MoELayer(config, routers[0]).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return layer.eval()


def softmax(values):
    top = max(float(v.detach()) for v in values)
    exp = [(v - top).exp() for v in values]
    return [e / sum(exp) for e in exp]


def adamoe_true_only(z, k, kinds):
    chosen = sorted(range(len(z)), key=lambda e: -float(z[e].detach()))[:k]
    true = [e for e in chosen if e < E]
    weights = softmax([z[e] for e in true]) if true else []
    return dict(zip(true, weights, strict=True))


def adamoe_over_all(z, k, kinds):
    chosen = sorted(range(len(z)), key=lambda e: -float(z[e].detach()))[:k]
    return dict(zip(chosen, softmax([z[e] for e in chosen]), strict=True))


def raw(z, k, kinds):
    p = softmax(z)
    chosen = sorted(range(len(z)), key=lambda e: -float(z[e].detach()))[:k]
    return {e: p[e] for e in chosen}


def moepp(z, k, kinds):
    chosen = sorted(range(len(z)), key=lambda e: -float(z[e].detach()))[:k]
    counted = [e for e in chosen if e < E or kinds[e - E] != "zero"]
    return dict(zip(counted, softmax([z[e] for e in counted]) if counted else [], strict=True))


ZEROS = ("zero",) * 5
MIXED = ("zero", "copy", "constant", "constant")
CASES = {
    "adamoe": ("adamoe", ZEROS, 3, {}, adamoe_true_only),
    "adamoe over all": ("adamoe", ZEROS, 3, {"normalise_over": "selected"}, adamoe_over_all),
    "adamoe without renormalisation": ("olmoe", ZEROS, 3, {"balance_loss": "null_averaged"}, raw),
    "longcat": ("longcat", ("copy",) * 4, 3, {}, raw),
    "moepp": ("moepp", MIXED, 2, {}, moepp),
}


@pytest.mark.parametrize("case", CASES)
def test_layer_and_every_gradient_equal_the_plain_loop(case, tiny_config, tolerance):
    router, kinds, k, options, weights_of = CASES[case]
    layer = layer_of(tiny_config, router, kinds, k, **options)
    x_TD = torch.randn(T, D, dtype=torch.float64, requires_grad=True)
    y_TD, _, _ = layer(x_TD, Carry(), RoutingContext())
    price_TD = torch.randn(T, D, dtype=torch.float64)
    (y_TD * price_TD).sum().backward()

    copy = {name: p.detach().clone().requires_grad_() for name, p in layer.named_parameters()}
    x = x_TD.detach().clone().requires_grad_()
    rows = []
    for t in range(T):
        z = [(x[t] * copy["router.weight"][e]).sum() for e in range(E + len(kinds))]
        y = torch.zeros(D, dtype=torch.float64)
        num_constants = 0
        place_of_constant = {}
        for place, kind in enumerate(kinds):
            if kind == "constant":
                place_of_constant[place] = num_constants
                num_constants += 1
        for e, w in weights_of(z, k, kinds).items():
            if e < E:
                one = (torch.tensor([[e]]), w.view(1, 1))
                y = (
                    y
                    + swiglu_experts_reference(
                        x[t : t + 1], *one, copy["experts.gate_up_proj"], copy["experts.down_proj"]
                    )[0]
                )
            elif kinds[e - E] == "copy":
                y = y + w * x[t]
            elif kinds[e - E] == "constant":
                place = place_of_constant[e - E]
                a1, a2 = softmax([(copy["zero_compute.mix"][place, i] * x[t]).sum() for i in range(2)])
                y = y + w * (a1 * x[t] + a2 * copy["zero_compute.constant"][place])
        rows.append(y)
    reference = torch.stack(rows)
    torch.testing.assert_close(y_TD, reference, **tolerance[torch.float64])
    (reference * price_TD).sum().backward()
    torch.testing.assert_close(x_TD.grad, x.grad, **tolerance[torch.float64])
    for name, parameter in layer.named_parameters():
        expected = torch.zeros_like(parameter) if copy[name].grad is None else copy[name].grad
        torch.testing.assert_close(parameter.grad, expected, **tolerance[torch.float64])


@pytest.mark.parametrize(
    ("case", "learns"),
    [
        ("adamoe", False),
        ("adamoe over all", True),
        ("adamoe without renormalisation", True),
        ("longcat", True),
    ],
)
def test_trap_null_rows_learn_from_the_language_model_only_without_true_only_weights(case, learns, tiny_config):
    router, kinds, k, options, _ = CASES[case]
    layer = layer_of(tiny_config, router, kinds, k, **options)
    y_TD, _, _ = layer(torch.randn(64, D, dtype=torch.float64), Carry(), RoutingContext())
    y_TD.square().sum().backward()
    null_grad = layer.router.weight.grad[E:]
    assert bool(null_grad.any()) is learns, "exactly zero, not merely small"
    assert layer.router.weight.grad[:E].any()


def test_trap_token_with_one_true_expert_gives_its_router_no_gradient(tiny_config):
    layer = layer_of(tiny_config, "adamoe", ZEROS, 3)
    x_TD = torch.randn(200, D, dtype=torch.float64)
    routing, _, _ = layer.router(x_TD, Carry(), RoutingContext())
    num_true_T = (routing.expert_TK < E).sum(dim=1)
    for num_true, learns in ((1, False), (2, True)):
        layer.zero_grad()
        y_TD, _, _ = layer(x_TD[num_true_T == num_true], Carry(), RoutingContext())
        y_TD.square().sum().backward()
        assert bool(layer.router.weight.grad.any()) is learns


def test_weights_sum_to_one_or_zero_and_all_null_tokens_are_bypassed(tiny_config):
    layer = layer_of(tiny_config, "adamoe", ZEROS, 2)
    x_TD = torch.randn(200, D, dtype=torch.float64)
    routing, _, _ = layer.router(x_TD, Carry(), RoutingContext())
    is_null_T = (routing.expert_TK >= E).all(dim=1)
    assert is_null_T.any()
    torch.testing.assert_close(routing.weight_TK.sum(dim=1), (~is_null_T).double())
    y_TD, _, _ = layer(x_TD, Carry(), RoutingContext())
    assert not y_TD[is_null_T].any()


@pytest.mark.parametrize(("name", "base"), [("adamoe", "mixtral"), ("moepp", "mixtral")])
def test_without_nulls_it_is_bitwise_the_base_router(name, base):
    sizes = RouterSizes(width=D, num_experts=E, top_k=2, num_layers=1)
    ours, plain = (build_routers(router, sizes)[0] for router in (name, base))
    ours.init_parameters(0.5)
    plain.load_state_dict(ours.state_dict())
    x_TD = torch.randn(64, D)
    routing, _, stats = ours(x_TD, Carry(), RoutingContext())
    other, _, other_stats = plain(x_TD, Carry(), RoutingContext())
    assert torch.equal(routing.expert_TK, other.expert_TK)
    assert torch.equal(routing.weight_TK, other.weight_TK)
    if name == "adamoe":
        assert torch.equal(BALANCE_LOSSES[stats.balance_loss](stats), BALANCE_LOSSES["switch"](other_stats))


# --- loads ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_nulls", "k", "load"), [(8, 3, 1.5), (16, 4, 1.33), (32, 4, 0.80), (40, 8, 1.33), (48, 8, 1.14)]
)
def test_expected_true_load_is_the_papers_table(num_nulls, k, load):
    assert expected_true_load(8, num_nulls, k) == pytest.approx(load, abs=0.005)
    sizes = RouterSizes(width=D, num_experts=8, top_k=k, num_layers=1, zero_compute=("zero",) * num_nulls)
    router = build_routers("adamoe", sizes)[0]
    router.init_parameters(1.0)
    _, _, stats = router(torch.randn(4000, D), Carry(), RoutingContext())
    assert stats.true_load.item() == pytest.approx(load, abs=0.35), "random rows are roughly balanced"


def test_null_rows_copied_from_true_rows_start_near_the_target_load():
    """m = 8, k = 3: 1.48 was measured for exact copies; noise keeps twins from tying."""
    sizes = RouterSizes(width=D, num_experts=8, top_k=3, num_layers=1, zero_compute=("zero",) * 8)
    router = build_routers("adamoe", sizes)[0]
    router.init_parameters(1.0)
    copy_ffn_rows_to_nulls(router.weight, 8, noise=1e-3)
    torch.testing.assert_close(router.weight[8:], router.weight[:8], atol=1e-2, rtol=0)
    _, _, stats = router(torch.randn(4000, D), Carry(), RoutingContext())
    assert stats.true_load.item() == pytest.approx(1.5, abs=0.1)
    with pytest.raises(ValueError, match="multiple"):
        copy_ffn_rows_to_nulls(torch.zeros(11, 4), 8, noise=0.0)


@pytest.mark.parametrize("target", [1.0, 2.0])
def test_longcat_bias_reaches_the_target_load(target):
    sizes = RouterSizes(width=D, num_experts=E, top_k=3, num_layers=1, zero_compute=("copy",) * 3)
    router = build_routers("longcat", sizes, {"target_load": target})[0]
    router.init_parameters(0.3)
    x_TD = torch.randn(512, D) + 0.3
    for _ in range(200):
        _, _, stats = router(x_TD, Carry(), RoutingContext())
        router.post_step(stats.count_R, stats.num_tokens)
    assert stats.true_load.item() == pytest.approx(target, abs=0.05)
    assert not router.bias_R[E:].any(), "nulls are steered through the FFN experts' bias alone"


def test_longcat_bias_step_by_hand():
    """K = 3, E = 6, target 2: aim 2/3/6 = 1/9 of the slots each; loads 9, 3, 0, ... of 30."""
    sizes = RouterSizes(width=D, num_experts=6, top_k=3, num_layers=1, zero_compute=("copy",) * 2)
    router = build_routers("longcat", sizes, {"bias_rate": 0.9, "target_load": 2.0})[0]
    router.post_step(torch.tensor([9, 3, 0, 4, 4, 4, 3, 3]), 10)
    expected = [0.9 * (1 / 9 - n / 30) for n in (9, 3, 0, 4, 4, 4)] + [0.0, 0.0]
    assert router.bias_R.tolist() == pytest.approx(expected)


# --- MoE++ ----------------------------------------------------------------------------------------------------------


def test_gating_residual_adds_the_previous_raw_logits_with_gradient(tolerance):
    sizes = RouterSizes(width=4, num_experts=3, top_k=2, num_layers=3, zero_compute=("zero", "copy"))
    routers = [router.double() for router in build_routers("moepp", sizes)]
    for router in routers:
        router.init_parameters(1.0)
    x_LTD = torch.randn(3, T, 4, dtype=torch.float64)
    carry, logits = Carry(), []
    for router, x_TD in zip(routers, x_LTD, strict=True):
        _, carry, stats = router(x_TD, carry, RoutingContext())
        logits.append(stats.logit_TR)
    expected = x_LTD[0] @ routers[0].weight.T
    torch.testing.assert_close(logits[0], expected, **tolerance[torch.float64])
    for layer in (1, 2):
        expected = x_LTD[layer] @ routers[layer].weight.T + expected @ routers[layer].residual_weight.T
        torch.testing.assert_close(logits[layer], expected, **tolerance[torch.float64])
    logits[2].square().sum().backward()
    assert routers[0].weight.grad.any(), "gradient flows through the depth"
    assert routers[0].residual_weight is None


def test_heterogeneous_capacity_and_weighted_loss_by_hand():
    """tau .5, E 2, Z 2, gamma 1.1, T 100, K 2: shares 1/6 and 1/3 of 200 slots make 37 (36.67) and 74 (73.3)."""
    sizes = RouterSizes(width=4, num_experts=2, top_k=2, num_layers=1, zero_compute=("zero", "copy"))
    router = build_routers("moepp", sizes, {"ffn_share": 0.5})[0]
    router.init_parameters(1.0)
    _, _, stats = router(torch.randn(100, 4), Carry(), RoutingContext(is_training=True))
    assert stats.kept_R.tolist() == [min(n, c) for n, c in zip(stats.count_R.tolist(), (37, 37, 74, 74), strict=True)]
    share_R, p_R = stats.count_R / 200, stats.probability_R
    eta_R = torch.tensor([1.0, 1.0, 0.5, 0.5])
    published = (eta_R * share_R * p_R).sum()
    ours = BALANCE_LOSSES["switch"](stats)
    # the same terms in the same proportion; ours is 1 at the target: 1 / eta summed over shares is tau E + Z over tau
    torch.testing.assert_close(ours, published * (0.5 * 2 + 2) / 0.5)
    assert math.isclose(stats.target_share_R.sum().item(), 1.0, rel_tol=1e-6)


def test_unknown_kind_and_impossible_targets_are_refused():
    sizes = RouterSizes(width=4, num_experts=2, top_k=2, num_layers=1, zero_compute=("copy",))
    with pytest.raises(ValueError, match="target_load must be below top_k = 2"):
        build_routers("longcat", sizes, {"target_load": 2.0})
    with pytest.raises(ValueError, match="there are none"):
        build_routers("longcat", RouterSizes(width=4, num_experts=2, top_k=2, num_layers=1))


def test_two_layer_gate_and_normalised_logits_equal_the_plain_loop(tolerance):
    """As in the released code: tanh between two maps without bias; the carried logits are not normalised."""
    sizes = RouterSizes(width=4, num_experts=E, top_k=2, num_layers=2, zero_compute=("zero", "copy"))
    R = sizes.num_routable
    routers = [r.double() for r in build_routers("moepp", sizes, {"gate_layers": 2, "logit_std": 0.5})]
    for router in routers:
        router.init_parameters(0.7)
    x_LTD = torch.randn(2, T, 4, dtype=torch.float64)
    price_TR = torch.randn(T, R, dtype=torch.float64)
    first, carry, _ = routers[0](x_LTD[0], Carry(), RoutingContext())
    second, _, _ = routers[1](x_LTD[1], carry, RoutingContext())
    (second.weight_TK * price_TR.gather(1, second.expert_TK)).sum().backward()

    copies = [{name: p.detach().clone().requires_grad_() for name, p in r.named_parameters()} for r in routers]
    total = 0
    for t in range(T):
        before = None
        for layer, (copy, found) in enumerate(zip(copies, (first, second), strict=True)):
            hidden = [(x_LTD[layer, t] * row).sum().tanh() for row in copy["hidden_weight"]]
            assert len(hidden) == 8 * R
            z = [sum(h * w for h, w in zip(hidden, row, strict=True)) for row in copy["weight"]]
            if before is not None:
                z = [z[r] + sum(copy["residual_weight"][r, s] * before[s] for s in range(R)) for r in range(R)]
            before, mean = z, sum(z) / R
            std = (sum((v - mean) ** 2 for v in z) / (R - 1)).sqrt()
            weights = moepp([v * 0.5 / std for v in z], 2, ("zero", "copy"))
            ids, values = found.expert_TK[t].tolist(), found.weight_TK[t].tolist()
            slots = {e: w for e, w in zip(ids, values, strict=True) if e != E}
            assert slots == pytest.approx({e: w.item() for e, w in weights.items()})
        total = total + sum(w * price_TR[t, e] for e, w in weights.items())
    total.backward()
    for router, copy in zip(routers, copies, strict=True):
        for name, parameter in router.named_parameters():
            torch.testing.assert_close(parameter.grad, copy[name].grad, **tolerance[torch.float64])


@pytest.mark.parametrize(("options", "message"), [({"gate_layers": 3}, "1 or 2"), ({"logit_std": 0.0}, "positive")])
def test_bad_gates_of_moepp_are_refused(options, message):
    sizes = RouterSizes(width=4, num_experts=3, top_k=2, num_layers=2, zero_compute=("zero", "copy"))
    with pytest.raises(ValueError, match=message):
        build_routers("moepp", sizes, options)
