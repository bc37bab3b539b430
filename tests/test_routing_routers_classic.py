"""The classic router against plain loops over tokens and experts, forward and every gradient, in float64."""

import itertools
import math

import pytest
import torch

from moe import MoEForCausalLM
from routing import ROUTERS, Carry, RouterSizes, RoutingContext, build_routers
from routing.routers.classic.rule import Scoring

T, D, E, K = 9, 5, 8, 3


def softmax(values):
    top = max(float(v.detach()) for v in values)
    exp = [(v - top).exp() for v in values]
    return [e / sum(exp) for e in exp]


def best(scores, k):
    """Ids of the k largest, best first."""
    return sorted(range(len(scores)), key=lambda e: -float(scores[e].detach()))[:k]


def switch(z, k):
    p = softmax(z)
    return [(e, p[e]) for e in best(p, k)]


def mixtral(z, k):
    chosen = best(z, k)
    return list(zip(chosen, softmax([z[e] for e in chosen]), strict=True))


def qwen3_moe(z, k):
    weighted = switch(z, k)
    return [(e, w / sum(w for _, w in weighted)) for e, w in weighted]


def deepseek_v3(z, k, bias=None, num_groups=1, groups_kept=1):
    s = [1 / (1 + (-v).exp()) for v in z]
    biased = [float(v.detach()) + (0.0 if bias is None else bias[e]) for e, v in enumerate(s)]
    size = len(z) // num_groups
    groups = [range(g * size, (g + 1) * size) for g in range(num_groups)]
    rank = sorted(groups, key=lambda group: -sum(sorted((biased[e] for e in group), reverse=True)[:2]))
    allowed = [e for group in rank[:groups_kept] for e in group]
    chosen = sorted(allowed, key=lambda e: -biased[e])[:k]
    return [(e, 2.5 * s[e] / sum(s[c] for c in chosen)) for e in chosen]


def deepseek_v2(z, k, num_groups, groups_kept):
    p = softmax(z)
    size = len(z) // num_groups
    rank = sorted(range(num_groups), key=lambda g: -max(float(p[e].detach()) for e in range(g * size, (g + 1) * size)))
    allowed = [e for g in rank[:groups_kept] for e in range(g * size, (g + 1) * size)]
    return [(e, 16.0 * p[e]) for e in sorted(allowed, key=lambda e: -float(p[e].detach()))[:k]]


CASES = {
    "classic": ({}, switch),
    "switch": ({}, switch),
    "olmoe": ({}, switch),
    "mixtral": ({}, mixtral),
    "qwen3_moe": ({}, qwen3_moe),
    "deepseek_v3": ({}, deepseek_v3),
    "deepseek_v3 groups": (
        {"num_groups": 4, "groups_kept": 2},
        lambda z, k: deepseek_v3(z, k, num_groups=4, groups_kept=2),
    ),
    "deepseek_v2": (
        {"num_groups": 4, "groups_kept": 2},
        lambda z, k: deepseek_v2(z, k, num_groups=4, groups_kept=2),
    ),
}


def build(name, *, sizes=None, dtype=torch.float64, **options):
    sizes = sizes or RouterSizes(width=D, num_experts=E, top_k=K, num_layers=1)
    router = build_routers(name, sizes, options)[0].to(dtype)
    router.init_parameters(1.0)
    return router


def run(router, x_TD, **context):
    return router(x_TD, Carry(), RoutingContext(**context))


@pytest.mark.parametrize("k", [1, K])
@pytest.mark.parametrize("case", CASES)
def test_forward_and_every_gradient_equal_the_plain_loop(case, k, tolerance):
    options, rule = CASES[case]
    router = build(case.split()[0], sizes=RouterSizes(width=D, num_experts=E, top_k=k, num_layers=1), **options)
    x_TD = torch.randn(T, D, dtype=torch.float64, requires_grad=True)
    routing, _, _ = run(router, x_TD)
    price_TE = torch.randn(T, E, dtype=torch.float64)
    (routing.weight_TK * price_TE.gather(1, routing.expert_TK)).sum().backward()

    x, weight = x_TD.detach().clone().requires_grad_(), router.weight.detach().clone().requires_grad_()
    total = 0
    for t in range(T):
        chosen = rule([(x[t] * weight[e]).sum() for e in range(E)], k)
        assert routing.expert_TK[t].tolist() == [e for e, _ in chosen]
        torch.testing.assert_close(
            routing.weight_TK[t], torch.stack([w for _, w in chosen]), **tolerance[torch.float64]
        )
        total = total + sum(w * price_TE[t, e] for e, w in chosen)
    total.backward()
    torch.testing.assert_close(x_TD.grad, x.grad, **tolerance[torch.float64])
    torch.testing.assert_close(router.weight.grad, weight.grad, **tolerance[torch.float64])


def test_statistics_by_hand():
    router = build("mixtral", sizes=RouterSizes(width=2, num_experts=3, top_k=2, num_layers=1))
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]]))
    routing, _, stats = run(router, torch.tensor([[2.0, 1.0], [0.0, 1.0]], dtype=torch.float64))
    assert routing.expert_TK.tolist() == [[0, 1], [1, 0]]
    assert stats.count_R.tolist() == stats.kept_R.tolist() == [2, 2, 0]
    assert (stats.num_tokens, stats.num_experts, stats.true_load.item()) == (2, 3, 2.0)
    rows = [[2.0, 1.0, -3.0], [0.0, 1.0, -1.0]]
    sums = [sum(map(math.exp, row)) for row in rows]
    assert stats.logsumexp_T.tolist() == pytest.approx([math.log(s) for s in sums])
    p = [[math.exp(v) / s for v in row] for row, s in zip(rows, sums, strict=True)]
    assert stats.probability_R.tolist() == pytest.approx([(a + b) / 2 for a, b in zip(*p, strict=True)])
    assert stats.entropy.item() == pytest.approx(sum(-v * math.log(v) for row in p for v in row) / 2)


# --- the balancing bias ---------------------------------------------------------------------------------------------


def test_bias_moves_ids_and_never_weights():
    router = build("deepseek_v3")
    x_TD = torch.randn(T, D, dtype=torch.float64)
    router.bias_R[2] = 10.0
    routing, _, stats = run(router, x_TD)
    assert (routing.expert_TK[:, 0] == 2).all()
    score_TE = (x_TD @ router.weight.T).sigmoid()
    chosen_TK = score_TE.gather(1, routing.expert_TK)
    torch.testing.assert_close(routing.weight_TK, 2.5 * chosen_TK / chosen_TK.sum(dim=1, keepdim=True))
    torch.testing.assert_close(stats.probability_R, (score_TE / score_TE.sum(dim=1, keepdim=True)).mean(dim=0))


def test_bias_step_is_the_sign_of_the_error():
    router = build("deepseek_v3", bias_rate=0.5)
    router.post_step(torch.tensor([0, 4, 4, 4, 4, 4, 4, 8]), 11)
    assert router.bias_R.tolist() == [0.5, 0, 0, 0, 0, 0, 0, -0.5]


def test_bias_balances_a_skewed_router():
    router = build("deepseek_v3", bias_rate=0.02)
    x_TD = torch.randn(256, D, dtype=torch.float64) + 1
    before = run(router, x_TD)[2].count_R.max()
    for _ in range(300):
        router.post_step(run(router, x_TD)[2].count_R, len(x_TD))
    mean = 256 * K / E
    assert before > 1.5 * mean
    assert run(router, x_TD)[2].count_R.max() < 1.15 * mean


def test_bias_stays_float32_and_exact_when_the_model_is_not():
    router = build("deepseek_v3", dtype=torch.float32)
    router.bias_R += 1.0009765625  # needs more bits than bfloat16 has
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        router.to(dtype)
        assert router.weight.dtype == dtype
        assert router.bias_R.dtype == torch.float32
        assert (router.bias_R == 1.0009765625).all()


# --- groups ---------------------------------------------------------------------------------------------------------


def test_trap_masked_groups_are_minus_infinity_not_zero():
    """With negative biased scores a mask of 0 would beat every expert of the kept groups."""
    router = build("deepseek_v3", num_groups=4, groups_kept=2)
    router.bias_R -= 5.0
    routing, _, _ = run(router, torch.randn(64, D, dtype=torch.float64))
    for experts in routing.expert_TK.tolist():
        assert len({e // 2 for e in experts}) <= 2
        assert len(set(experts)) == K


@pytest.mark.parametrize(("name", "kept"), [("deepseek_v2", [0, 1]), ("deepseek_v3", [2, 3])])
def test_group_score_is_the_best_or_the_best_two(name, kept):
    """Group 0 holds the best expert, group 1 the best pair."""
    sizes = RouterSizes(width=1, num_experts=4, top_k=2, num_layers=1)
    router = build(name, sizes=sizes, num_groups=2, groups_kept=1)
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[1.0], [-3.0], [0.9], [0.8]]))
    routing, _, _ = run(router, torch.ones(1, 1, dtype=torch.float64))
    assert sorted(routing.expert_TK[0].tolist()) == kept


# --- training only --------------------------------------------------------------------------------------------------


def test_capacity_and_jitter_apply_in_training_only():
    router = build(
        "switch", capacity_factor=0.5, jitter=0.5, sizes=RouterSizes(width=D, num_experts=E, top_k=1, num_layers=1)
    )
    x_TD = torch.randn(64, D, dtype=torch.float64)
    evaluated, _, stats = run(router, x_TD)
    assert (evaluated.expert_TK < E).all()
    assert torch.equal(stats.count_R, stats.kept_R)
    trained, _, stats = run(router, x_TD, is_training=True)
    assert stats.kept_R.max() <= math.ceil(0.5 * 64 / E)
    assert stats.kept_R.sum() == (trained.expert_TK < E).sum()
    assert stats.count_R.sum() == 64


def test_padding_takes_no_capacity_and_does_not_count():
    router = build(
        "switch", capacity_factor=1.0, jitter=0.0, sizes=RouterSizes(width=D, num_experts=2, top_k=1, num_layers=1)
    )
    x_TD = torch.randn(1, D, dtype=torch.float64).expand(6, D)
    valid_T = torch.tensor([False, False, False, True, True, False])
    routing, _, stats = run(router, x_TD, is_training=True, is_valid_T=valid_T)
    # two valid tokens, two experts, factor 1: one token each; the first valid one stays although padding precedes it
    assert (routing.expert_TK[:, 0] < 2).tolist() == [False, False, False, True, False, False]
    assert (stats.num_tokens, stats.count_R.sum(), stats.kept_R.sum()) == (2, 2, 1)
    assert routing.validate().weight_TK[~valid_T].abs().sum() == 0


def test_weights_after_drop_are_renormalised_only_on_request():
    sizes = RouterSizes(width=D, num_experts=4, top_k=2, num_layers=1)
    x_TD = torch.randn(32, D, dtype=torch.float64)
    for flag in (False, True):
        router = build("mixtral", sizes=sizes, capacity_factor=0.6, renormalise_kept=flag)
        routing, _, _ = run(router, x_TD, is_training=True)
        sum_T = routing.weight_TK.sum(dim=1)
        partly_T = (routing.expert_TK < 4).sum(dim=1) == 1
        assert partly_T.any()
        assert torch.allclose(sum_T[partly_T], torch.ones(1, dtype=torch.float64)) is flag


def test_top_k_of_one_call_may_differ():
    router = build("qwen3_moe")
    x_TD = torch.randn(T, D, dtype=torch.float64)
    for k in (1, 5):
        routing, _, _ = run(router, x_TD, top_k=k)
        assert torch.equal(routing.expert_TK, (x_TD @ router.weight.T).topk(k, dim=1).indices)
        torch.testing.assert_close(routing.weight_TK.sum(dim=1), torch.ones(T, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"1\.\.8"):
        run(router, x_TD, top_k=9)


def test_top_k_of_a_model_may_change_between_calls(tiny_config):
    model = MoEForCausalLM(tiny_config(router="qwen3_moe")).eval()
    token_BS = torch.randint(0, 96, (1, 5))
    for k in (1, 4, None):
        model.model.top_k = k
        stats = model(token_BS).router_stats
        assert {layer.chosen.expert_TK.shape[1] for layer in stats} == {k or 2}


@pytest.mark.parametrize(("name", "low", "high"), [("olmoe", 0.0, 1.0), ("mixtral", 1, 1), ("deepseek_v3", 2.5, 2.5)])
def test_weights_sum_to_what_their_normalisation_says(name, low, high):
    routing, _, _ = run(build(name), torch.randn(64, D, dtype=torch.float64))
    sum_T = routing.weight_TK.sum(dim=1)
    assert low - 1e-9 <= sum_T.min()
    assert sum_T.max() <= high + 1e-9


def test_tutel_factor_zero_drops_nothing():
    router = build("olmoe", capacity_factor=0.0, capacity_rule="tutel")
    _, _, stats = run(router, torch.randn(64, D, dtype=torch.float64), is_training=True)
    assert torch.equal(stats.count_R, stats.kept_R)


# --- numerics and traps ---------------------------------------------------------------------------------------------


def test_trap_amp_logits_are_float32_under_autocast():
    router = build("olmoe", dtype=torch.float32)
    x_TD = torch.randn(T, D)
    plain, _, plain_stats = run(router, x_TD)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed, _, stats = run(router, x_TD)
    assert mixed.weight_TK.dtype == stats.logit_TR.dtype == torch.float32
    assert torch.equal(mixed.weight_TK, plain.weight_TK)
    assert torch.equal(stats.logit_TR, plain_stats.logit_TR)


def test_trap_top_1_with_selected_softmax_has_no_gradient():
    """Mixtral's form is constant 1 at K = 1; the softmax over all experts (Switch) is not."""
    sizes = RouterSizes(width=D, num_experts=E, top_k=1, num_layers=1)
    for name, has_gradient in (("mixtral", False), ("switch", True)):
        router = build(name, sizes=sizes)
        routing, _, _ = run(router, torch.randn(T, D, dtype=torch.float64))
        routing.weight_TK.sum().backward()
        assert bool(router.weight.grad.any()) is has_gradient


def test_logit_bias_of_the_context_acts_on_selection_and_weights():
    router = build("mixtral")
    x_TD = torch.randn(T, D, dtype=torch.float64)
    offset_LR = torch.randn(1, E, dtype=torch.float64, requires_grad=True)
    routing, _, _ = run(router, x_TD, logit_bias_LR=offset_LR)
    top = (x_TD @ router.weight.T + offset_LR).topk(K, dim=1)
    assert torch.equal(routing.expert_TK, top.indices)
    torch.testing.assert_close(routing.weight_TK, top.values.softmax(dim=1))
    routing.weight_TK[:, 0].sum().backward()
    assert offset_LR.grad.any()


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mixtrl", {}, "did you mean 'mixtral'"),
        ("classic", {"scor": "softmax"}, "unknown router option 'scor'"),
        ("classic", {"score": "tanh"}, "score must be one of softmax"),
        ("classic", {"num_groups": 3}, "8 experts do not divide into 3 groups"),
        ("classic", {"num_groups": 8, "groups_kept": 2}, "2 groups hold 2 experts, fewer than top_k = 3"),
        ("classic", {"num_groups": 2, "groups_kept": 3}, r"1\.\.2"),
        ("classic", {"capacity_factor": 0.0}, "capacity_factor must be positive"),
        ("classic", {"capacity_policy": "lottery"}, "capacity_policy must be one of"),
        ("classic", {"jitter": 1.0}, "jitter"),
        ("classic", {"num_groups": 0}, "num_groups must be at least 1"),
        ("classic", {"num_groups": "2"}, "num_groups must be int; got '2'"),
        ("classic", {"renormalise": 1}, "renormalise must be bool; got 1"),
        ("classic", {"capacity_factor": float("nan")}, "capacity_factor must be a finite number"),
        ("classic", {"scale": "big"}, "scale must be a finite number; got 'big'"),
        ("pregate", {"ahead": 1.5}, "ahead must be int; got 1.5"),
        ("classic", {"bias_rate": -1e-3}, "bias_rate"),
        ("classic", {"balance_loss": "swich"}, "balance_loss must be one of"),
        ("classic", {"normalise_over": "ffn"}, "needs weights that are normalised"),
        ("classic", {"target_load": 1.5}, "bias_rate above 0"),
        ("classic", {"target_load": 1.5, "bias_rate": 0.1}, "there are none"),
    ],
)
def test_bad_options_are_refused_with_what_to_do(name, options, message):
    with pytest.raises(ValueError, match=message):
        build(name, **options)


@pytest.mark.parametrize("sizes", [{"top_k": 9}, {"top_k": 0}, {"width": 0}, {"num_experts": 0}, {"num_layers": 0}])
def test_bad_sizes_are_refused(sizes):
    with pytest.raises(ValueError, match=next(iter(sizes))):
        RouterSizes(**({"width": D, "num_experts": E, "top_k": K, "num_layers": 1} | sizes))


def test_every_combination_of_enumerated_settings_routes():
    sizes = RouterSizes(width=D, num_experts=4, top_k=2, num_layers=1, zero_compute=("zero", "copy"))
    x_TD = torch.randn(16, D, dtype=torch.float64)
    for score, over, policy, loss in itertools.product(
        ("softmax", "selected_softmax", "sigmoid"),
        ("selected", "ffn", "nonzero"),
        ("first", "priority", "weight", "random"),
        ("switch", "null_averaged"),
    ):
        router = build(
            "classic",
            sizes=sizes,
            score=score,
            renormalise=True,
            normalise_over=over,
            capacity_factor=0.9,
            capacity_policy=policy,
            balance_loss=loss,
            num_groups=3,
            groups_kept=2,
        )
        routing, _, _ = run(router, x_TD, is_training=True)
        assert routing.validate().weight_TK.isfinite().all()


def test_deepseek_v2_has_the_published_settings():
    rule = ROUTERS["deepseek_v2"](
        RouterSizes(width=4, num_experts=160, top_k=6, num_layers=1), num_groups=8, groups_kept=3
    )[0].rule
    assert (rule.scoring, rule.grouping.group_score) == (Scoring(scale=16.0), "max")
