"""Baselines that are not a plain rule: each against loops, brute force or numbers worked out by hand."""

import itertools
import math

import pytest
import torch

from routing import BALANCE_LOSSES, Carry, RouterSizes, RoutingContext, auxiliary_loss, build_routers
from routing.routers.classic.balanced import balanced_assignment, sinkhorn
from routing.routers.own_rules.relu import SparsityControl

T, D, E = 8, 4, 4


def build(name, *, top_k=1, num_layers=1, num_experts=E, vocab_size=None, **options):
    sizes = RouterSizes(width=D, num_experts=num_experts, top_k=top_k, num_layers=num_layers, vocab_size=vocab_size)
    routers = [router.double() for router in build_routers(name, sizes, options)]
    for router in routers:
        router.init_parameters(1.0)
    return routers if num_layers > 1 else routers[0]


def run(router, x_TD, **context):
    return router(x_TD, Carry(), RoutingContext(**context))


def inputs(num_tokens=T):
    return torch.randn(num_tokens, D, dtype=torch.float64)


def price_gradients(router, routing, x_TD, price_TE):
    """Gradients of sum of weight times price."""
    chosen_TK = routing.expert_TK.clamp(max=price_TE.shape[1] - 1)
    (routing.weight_TK * price_TE.gather(1, chosen_TK)).sum().backward()
    return x_TD.grad, router.weight.grad


# --- cosine ---------------------------------------------------------------------------------------------------------


def test_cosine_logits_and_gradients_equal_the_plain_loop(tolerance):
    router = build("xmoe", top_k=2, projection_width=3)
    x_TD = inputs().requires_grad_()
    _, _, stats = run(router, x_TD)
    price_TE = torch.randn(T, E, dtype=torch.float64)
    (stats.logit_TR * price_TE).sum().backward()
    names = ("weight", "projection", "log_scale")
    copy = {name: getattr(router, name).detach().clone().requires_grad_() for name in names}
    x = x_TD.detach().clone().requires_grad_()
    total = 0
    for t in range(T):
        low = [sum(copy["projection"][i, d] * x[t, d] for d in range(D)) for i in range(3)]
        norm = sum(v * v for v in low).sqrt()
        for e in range(E):
            direction = copy["weight"][e]
            cosine = sum(low[i] * direction[i] for i in range(3)) / norm / direction.square().sum().sqrt()
            logit = cosine * copy["log_scale"].exp()[0]
            torch.testing.assert_close(stats.logit_TR[t, e], logit, **tolerance[torch.float64])
            total = total + logit * price_TE[t, e]
    total.backward()
    torch.testing.assert_close(x_TD.grad, x.grad, **tolerance[torch.float64])
    for name in names:
        torch.testing.assert_close(getattr(router, name).grad, copy[name].grad, **tolerance[torch.float64])


def test_cosine_scale_starts_at_two_and_ends_at_a_hundred():
    router = build("xmoe")
    assert router.log_scale.exp().item() == pytest.approx(2.0)
    with torch.no_grad():
        router.log_scale.fill_(20.0)
    _, _, stats = run(router, inputs())
    assert stats.logit_TR.abs().max() <= 100


# --- GShard ---------------------------------------------------------------------------------------------------------


def test_gshard_weights_are_normalised_over_two_and_the_second_stays_by_chance():
    router = build("gshard", top_k=2, capacity_factor=100.0)
    x_TD = inputs(1).expand(20_000, D)
    routing, _, stats = run(router, x_TD, is_training=True)
    p = (x_TD[0] @ router.weight.T).softmax(dim=0).topk(2)
    second = (p.values[1] / p.values.sum()).item()
    assert routing.expert_TK[0, 0] == p.indices[0]
    share_kept = (routing.expert_TK[:, 1] < E).double().mean().item()
    assert share_kept == pytest.approx(min(1, 2 * second), abs=0.015)
    assert (routing.expert_TK[:, 0] < E).all()
    assert stats.balance_loss == "first_choice"
    evaluated, _, _ = run(router, x_TD)
    assert (evaluated.expert_TK < E).all()
    torch.testing.assert_close(evaluated.weight_TK[0], p.values / p.values.sum())


def test_gshard_second_choices_queue_after_all_first_choices():
    router = build("gshard", top_k=2, capacity_factor=0.5, num_experts=2)
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[0.01, 0, 0, 0], [0.0, 0, 0, 0]]))
    x_TD = torch.zeros(8, D, dtype=torch.float64)
    x_TD[:6, 0], x_TD[6:, 0] = 1.0, -1.0  # six tokens prefer expert 0, two prefer expert 1; capacity 4
    routing, _, _ = run(router, x_TD, is_training=True)
    kept = (routing.expert_TK < 2).tolist()
    assert [first for first, _ in kept] == [True] * 4 + [False] * 2 + [True] * 2
    # expert 1 has two seats left for the second choices of the first tokens
    assert sum(second for _, second in kept[:6]) <= 2
    assert not any(second for _, second in kept[6:])


# --- sigma-MoE ------------------------------------------------------------------------------------------------------


def test_sigma_weights_do_not_compete_and_dropout_hides_experts_in_training():
    router = build("sigma_moe", top_k=2, expert_dropout=0.5)
    x_TD = inputs(2000)
    score_TE = (x_TD @ router.weight.T).sigmoid()
    routing, _, stats = run(router, x_TD)
    torch.testing.assert_close(routing.weight_TK, score_TE.topk(2, dim=1).values)
    mean_E = (x_TD @ router.weight.T).softmax(dim=1).mean(dim=0)
    torch.testing.assert_close(BALANCE_LOSSES[stats.balance_loss](stats), (mean_E * mean_E.log()).sum())
    trained, _, _ = run(router, x_TD, is_training=True)
    best_T = score_TE.argmax(dim=1)
    hidden = (trained.expert_TK != best_T[:, None]).all(dim=1).double().mean().item()
    assert hidden == pytest.approx(0.5, abs=0.05), "the best is drawn out half the time, and never comes back"
    is_empty_TK = trained.expert_TK == E
    # fewer than two of four are left: five of sixteen cases, all or all but one are hidden
    assert is_empty_TK.any(dim=1).double().mean().item() == pytest.approx(5 / 16, abs=0.05)
    weight_TK = score_TE.gather(1, trained.expert_TK.clamp(max=E - 1)).masked_fill(is_empty_TK, 0)
    torch.testing.assert_close(trained.weight_TK, weight_TK)


def test_sigma_rows_start_with_equal_norm_and_the_dense_equivalent_spread():
    sizes = RouterSizes(width=512, num_experts=16, top_k=4, num_layers=12)
    router = build_routers("sigma_moe", sizes)[0]
    router.init_parameters(0.02)
    torch.testing.assert_close(router.weight.norm(dim=1), torch.full((16,), (2 / 12) ** 0.5))


# --- Sinkhorn and BASE ----------------------------------------------------------------------------------------------


def test_sinkhorn_matrix_has_the_right_margins_and_order():
    logit_TR = torch.randn(12, 3, dtype=torch.float64) * 2
    plan = sinkhorn(logit_TR, tolerance=1e-12)
    torch.testing.assert_close(plan.sum(dim=0), torch.full((3,), 1 / 3, dtype=torch.float64))
    torch.testing.assert_close(plan.sum(dim=1), torch.full((12,), 1 / 12, dtype=torch.float64))
    ratio = plan / logit_TR.exp()
    torch.testing.assert_close(ratio * ratio[0, 0], ratio[:, :1] * ratio[:1])  # a scaling of rows and columns
    assert sinkhorn(torch.tensor([[500.0, 0.0], [400.0, 0.0]])).isfinite().all()


@pytest.mark.parametrize("top_k", [1, 2])
def test_sinkhorn_balances_training_and_is_greedy_outside_it(top_k):
    router = build("sinkhorn", top_k=top_k)
    x_TD = inputs(256) + 1
    logit_TE = x_TD @ router.weight.T
    gate_TE = logit_TE.sigmoid() if top_k == 1 else logit_TE.softmax(dim=1)
    trained, _, stats = run(router, x_TD, is_training=True)
    evaluated, _, greedy_stats = run(router, x_TD)
    assert torch.equal(evaluated.expert_TK, logit_TE.topk(top_k, dim=1).indices)
    for routing in (trained, evaluated):
        torch.testing.assert_close(routing.weight_TK, gate_TE.gather(1, routing.expert_TK))
    assert stats.count_R.max() < greedy_stats.count_R.max()
    # ties of the column scaling aside the plan's argmax is near balanced for k = 1
    assert top_k == 2 or stats.count_R.max() < 1.5 * 256 / E


def test_base_assignment_is_the_best_of_all_balanced_ones():
    for _ in range(5):
        score_TR = torch.randn(6, 3)
        expert_T = balanced_assignment(score_TR)
        assert torch.bincount(expert_T, minlength=3).tolist() == [2, 2, 2]
        best = max(
            sum(score_TR[t, e].item() for t, e in enumerate(experts))
            for experts in itertools.product(range(3), repeat=6)
            if all(experts.count(e) == 2 for e in range(3))
        )
        assert score_TR.gather(1, expert_T[:, None]).sum().item() == pytest.approx(best, abs=1e-5)


def test_base_is_balanced_in_training_greedy_outside_and_weighs_by_sigmoid():
    router = build("base")
    x_TD = inputs(30) + 1
    trained, _, stats = run(router, x_TD, is_training=True)
    assert stats.count_R.max() <= math.ceil(30 / E)
    evaluated, _, _ = run(router, x_TD)
    logit_TE = x_TD @ router.weight.T
    assert torch.equal(evaluated.expert_TK[:, 0], logit_TE.argmax(dim=1))
    torch.testing.assert_close(trained.weight_TK, logit_TE.sigmoid().gather(1, trained.expert_TK))


@pytest.mark.parametrize("name", ["base", "sinkhorn", "expert_choice"])
def test_padding_takes_part_in_no_assignment(name):
    router = build(name)
    x_TD = inputs(40)
    valid_T = torch.arange(40) % 3 != 0
    padded, _, stats = run(router, x_TD, is_training=True, is_valid_T=valid_T)
    alone, _, alone_stats = run(router, x_TD[valid_T], is_training=True)
    assert torch.equal(stats.count_R, alone_stats.count_R)
    assert torch.equal(padded.expert_TK[valid_T], alone.expert_TK)


# --- expert choice --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mean_experts", [None, 1.5])
def test_expert_choice_equals_the_plain_loop(mean_experts, tolerance):
    router = build("expert_choice", top_k=2, mean_experts=mean_experts)
    x_TD = inputs().requires_grad_()
    price_TE = torch.randn(T, E, dtype=torch.float64)
    routing, _, _ = run(router, x_TD)
    x_grad, weight_grad = price_gradients(router, routing, x_TD, price_TE)
    x, weight = x_TD.detach().clone().requires_grad_(), router.weight.detach().clone().requires_grad_()
    capacity = int((mean_experts or 2) * T / E)
    p = []
    for t in range(T):
        exp = [(x[t] * weight[e]).sum().exp() for e in range(E)]
        p.append([v / sum(exp) for v in exp])
    total, chosen = 0, [set() for _ in range(T)]
    for e in range(E):
        for t in sorted(range(T), key=lambda t: -float(p[t][e].detach()))[:capacity]:
            chosen[t].add(e)
            total = total + p[t][e] * price_TE[t, e]
    total.backward()
    assert [{e for e in row if e < E} for row in routing.expert_TK.tolist()] == chosen
    assert routing.count_R.tolist() == [capacity] * E
    torch.testing.assert_close(x_grad, x.grad, **tolerance[torch.float64])
    torch.testing.assert_close(weight_grad, weight.grad, **tolerance[torch.float64])


def test_expert_choice_leaks_the_future_and_says_so():
    router = build("expert_choice", top_k=1)
    assert not router.is_causal
    x_TD = inputs()
    before, _, _ = run(router, x_TD)
    changed = [
        not torch.equal(run(router, torch.cat([x_TD[:-1], 9 * inputs(1)]))[0].expert_TK[:-1], before.expert_TK[:-1])
        for _ in range(20)
    ]
    assert any(changed), "a later token changes an earlier token's experts"


def test_expert_choice_takes_no_token_choice_rule():
    with pytest.raises(ValueError, match="only option is mean_experts"):
        build("expert_choice", capacity_factor=1.0)


# --- ReMoE ----------------------------------------------------------------------------------------------------------


def test_remoe_weights_penalty_and_gradients_equal_the_plain_loop(tolerance):
    router = build("remoe", top_k=2, initial_penalty=0.25)
    x_TD = inputs().requires_grad_()
    routing, _, stats = run(router, x_TD)
    price_TE = torch.randn(T, E, dtype=torch.float64)
    chosen_TK = routing.expert_TK.clamp(max=E - 1)
    loss = (routing.weight_TK * price_TE.gather(1, chosen_TK)).sum() + auxiliary_loss(
        [stats], balance_weight=1.0, z_weight=1.0
    )
    loss.backward()
    x, weight = x_TD.detach().clone().requires_grad_(), router.weight.detach().clone().requires_grad_()
    w = [[(x[t] * weight[e]).sum() for e in range(E)] for t in range(T)]
    w = [[v if v > 0 else 0 * v for v in row] for row in w]
    count = [sum(1 for t in range(T) if float(w[t][e].detach()) > 0) for e in range(E)]
    penalty = 0.25 * E / (2 * T * T) * sum(count[e] * sum(w[t][e] for t in range(T)) for e in range(E))
    reference = sum(w[t][e] * price_TE[t, e] for t in range(T) for e in range(E)) + penalty
    assert stats.count_R.tolist() == count
    torch.testing.assert_close(loss, reference, **tolerance[torch.float64])  # 0.25 is exact in the float32 buffer
    reference.backward()
    torch.testing.assert_close(x_TD.grad, x.grad, **tolerance[torch.float64])
    torch.testing.assert_close(router.weight.grad, weight.grad, **tolerance[torch.float64])


def test_remoe_starts_half_dense():
    router = build("remoe", num_experts=32)
    assert run(router, inputs(500))[2].true_load.item() == pytest.approx(16, abs=2)


def test_remoe_control_holds_the_active_share_at_the_target():
    """On a plant whose active share falls with the penalty weight, the weight settles within a factor of its target."""
    control = SparsityControl(num_layers=1, target_share=0.25, initial=1e-8, growth=1.2)
    for _ in range(200):
        control.report(1 / (1 + control.penalty_weight.squeeze() / 1e-3))
    assert 3e-3 / 1.2**2 < control.penalty_weight.item() < 3e-3 * 1.2**2, "a quarter is active at 3e-3"


def test_remoe_penalty_is_one_for_all_layers_and_moves_by_its_factor_once_per_step():
    routers = build("remoe", top_k=1, num_layers=2)
    control = routers[0].control
    assert routers[1]._shared[0] is control
    weight = control.penalty_weight.item()
    routers[0].post_step(torch.tensor([8, 8, 8, 8]), 8)  # all active: 1
    assert control.penalty_weight.item() == weight, "not before every layer has reported"
    routers[1].post_step(torch.tensor([0, 0, 0, 0]), 8)  # mean 0.5 > 1/4
    assert control.penalty_weight.item() == pytest.approx(1.2 * weight)
    for router in routers:
        router.post_step(torch.tensor([1, 0, 0, 0]), 8)
    assert control.penalty_weight.item() == pytest.approx(weight)


# --- hash and forced ------------------------------------------------------------------------------------------------


def test_hash_is_a_balanced_table_of_token_ids():
    routers = build("hash", top_k=2, num_layers=2, vocab_size=40)
    ids = torch.arange(40)
    routing, _, stats = run(routers[0], inputs(40), token_id_T=ids)
    assert stats.count_R.tolist() == [20] * E
    assert (routing.expert_TK[:, 0] != routing.expert_TK[:, 1]).all()
    assert (routing.weight_TK == 0.5).all()
    assert not list(routers[0].parameters())
    assert not torch.equal(routers[0].expert_VK, routers[1].expert_VK), "layers differ"
    again, _, _ = run(routers[0], inputs(3), token_id_T=torch.tensor([7, 7, 9]))
    assert torch.equal(again.expert_TK, routing.expert_TK[[7, 7, 9]])
    other = build("hash", top_k=2, num_layers=2, vocab_size=40, seed=1)
    assert not torch.equal(other[0].expert_VK, routers[0].expert_VK)
    with pytest.raises(ValueError, match="input_ids"):
        run(routers[0], inputs(3))
    with pytest.raises(ValueError, match="vocabulary"):
        build("hash")


@pytest.mark.parametrize("row_by", ["position", "order"])
def test_forced_replays_what_it_was_given(row_by):
    router = build("forced", top_k=2, num_rows=3, row_by=row_by)
    expert_PK = torch.tensor([[0, 1], [2, E], [3, 0]])
    router.replay(expert_PK)
    position_T = torch.tensor([2, 0, 1])
    routing, _, _ = run(router, inputs(3), position_T=position_T)
    rows = expert_PK[position_T] if row_by == "position" else expert_PK
    assert torch.equal(routing.validate().expert_TK, rows)
    assert torch.equal(routing.weight_TK, (rows < E) * 0.5)
    with pytest.raises(ValueError, match="3 rows; row 3"):
        run(router, inputs(4), position_T=torch.arange(4))
    with pytest.raises(ValueError, match=r"\(3, 2\); got torch.int64 \(2, 2\)"):
        router.replay(expert_PK[:2])
    with pytest.raises(ValueError, match=r"0\.\.4"):
        router.replay(expert_PK + 1)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("gshard", {"top_k": 1}, "exactly 2"),
        ("base", {"top_k": 2}, "exactly 1"),
        ("sigma_moe", {"expert_dropout": 1.0}, "expert_dropout"),
        ("xmoe", {"temperature": 0.0}, "temperature"),
        ("xmoe", {"projection_width": 0}, "projection_width"),
        ("remoe", {"penalty_growth": 1.0}, "growth above 1"),
        ("remoe", {"score": "softmax"}, "unknown router option 'score'"),
        ("expert_choice", {"mean_experts": 9.0}, r"0\.\.4"),
        ("forced", {"num_rows": 0}, "num_rows"),
        ("forced", {"row_by": "chance"}, "row_by must be one of"),
    ],
)
def test_bad_options_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        build(name, **options)


@pytest.mark.parametrize(("name", "top_k"), [("gshard", 2), ("base", 1), ("remoe", 2), ("hash", 2), ("forced", 2)])
def test_routers_with_a_fixed_k_refuse_another_one(name, top_k):
    router = build(name, top_k=top_k, vocab_size=40)
    context = {"token_id_T": torch.arange(T), "position_T": torch.zeros(T, dtype=torch.int64)}
    run(router, inputs(), top_k=top_k, **context)
    with pytest.raises(ValueError, match="cannot change K between calls; got top_k = 3"):
        run(router, inputs(), top_k=3, **context)
