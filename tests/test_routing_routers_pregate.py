"""Pre-gated routing: which gate decides where, what the carry plans, who learns, what is refused."""

import pytest
import torch

from moe import MoEForCausalLM
from routing import Carry, RouterSizes, RoutingContext, build_routers
from routing.routers.own_rules.pregate import planned_experts

T, D, E, K, L = 6, 4, 6, 2, 5


def build(inner="mixtral", ahead=1, sizes=None, **inner_options):
    sizes = sizes or RouterSizes(width=D, num_experts=E, top_k=K, num_layers=L)
    options = {"ahead": ahead, "inner": inner, "inner_options": inner_options}
    routers = [router.double() for router in build_routers("pregate", sizes, options)]
    for router in routers:
        for module in router.modules():
            if hasattr(module, "init_parameters"):
                module.init_parameters(1.0)
    return routers


def run(routers, x_LTD, context=None):
    context = context or RoutingContext()
    carry, results = routers[0].begin(context), []
    for router, x_TD in zip(routers, x_LTD, strict=True):
        routing, carry, stats = router(x_TD, carry, context)
        results.append((routing, stats))
    assert not carry.tensors or "plan" not in "".join(carry.tensors), "every plan is used up"
    return results


def gate_of(routers, block, ahead):
    return routers[block].own_gate if block < ahead else routers[block - ahead].pre_gate


@pytest.mark.parametrize("ahead", [1, 2, 3, 4])
def test_ids_weights_and_gradients_come_from_the_earlier_blocks_input(ahead, tolerance):
    routers, x_LTD = build(ahead=ahead), torch.randn(L, T, D, dtype=torch.float64, requires_grad=True)
    upstream_LTK, ours, theirs = torch.randn(L, T, K).double(), 0.0, 0.0
    for block, (routing, stats) in enumerate(run(routers, x_LTD)):
        read_at = block if block < ahead else block - ahead
        logit_TE = x_LTD[read_at] @ gate_of(routers, block, ahead).weight.T
        top = logit_TE.topk(K, dim=1)
        assert torch.equal(routing.expert_TK, top.indices)
        torch.testing.assert_close(routing.weight_TK, top.values.softmax(dim=1), **tolerance[torch.float64])
        torch.testing.assert_close(stats.logit_TR, logit_TE, **tolerance[torch.float64])
        ours = ours + (routing.weight_TK * upstream_LTK[block]).sum()
        theirs = theirs + (top.values.softmax(dim=1) * upstream_LTK[block]).sum()
    leaves = [x_LTD, *(gate_of(routers, block, ahead).weight for block in range(L))]
    found = torch.autograd.grad(ours, leaves, retain_graph=True)
    for a, b in zip(found, torch.autograd.grad(theirs, leaves), strict=True):
        torch.testing.assert_close(a, b, **tolerance[torch.float64])


@pytest.mark.parametrize("ahead", [1, 2, 3])
def test_first_blocks_own_two_gates_and_the_last_plan_nothing(ahead):
    routers = build(ahead=ahead)
    assert [router.own_gate is not None for router in routers] == [block < ahead for block in range(L)]
    assert [router.pre_gate is not None for router in routers] == [block + ahead < L for block in range(L)]
    num_gates = sum(1 for router in routers for name, _ in router.named_parameters() if name.endswith("weight"))
    assert num_gates == L, "as many gates as blocks, each registered once"


def test_gradient_of_a_block_reaches_the_earlier_input_through_its_weights():
    routers = build(ahead=2)
    x_LTD = torch.randn(L, T, D, dtype=torch.float64, requires_grad=True)
    routing, _ = run(routers, x_LTD)[3]
    routing.weight_TK[:, 0].sum().backward()
    assert [bool(x_LTD.grad[block].any()) for block in range(L)] == [False, True, False, False, False]
    assert routers[1].pre_gate.weight.grad.any()


def test_ahead_0_is_the_base_router():
    x_LTD = torch.randn(L, T, D, dtype=torch.float64)
    pregated = build(ahead=0)
    plain = build_routers("mixtral", RouterSizes(width=D, num_experts=E, top_k=K, num_layers=L))
    for ours, base in zip(pregated, plain, strict=True):
        base.double().load_state_dict(ours.state_dict())
    for (a, _), (b, _) in zip(run(pregated, x_LTD), run(plain, x_LTD), strict=True):
        assert torch.equal(a.expert_TK, b.expert_TK)
        assert torch.equal(a.weight_TK, b.weight_TK)


@pytest.mark.parametrize("ahead", [1, 2, 3])
def test_carry_is_an_exact_prefetch_plan(ahead):
    routers, x_LTD, context = build(ahead=ahead), torch.randn(L, T, D, dtype=torch.float64), RoutingContext()
    carry, plans = Carry(), {}
    for block, (router, x_TD) in enumerate(zip(routers, x_LTD, strict=True)):
        routing, carry, _ = router(x_TD, carry, context)
        if block >= ahead:
            assert torch.equal(plans[block], routing.expert_TK)
        if block + ahead < L:
            plans[block + ahead] = planned_experts(carry, block + ahead)
    assert sorted(plans) == list(range(ahead, L))


def test_plan_follows_its_tokens_through_gather():
    routers, x_LTD, context = build(), torch.randn(L, T, D, dtype=torch.float64), RoutingContext()
    _, carry, _ = routers[0](x_LTD[0], Carry(), context)
    order = torch.randperm(T)
    routing, _, _ = routers[1](x_LTD[1], carry, context)
    moved, _, _ = routers[1](x_LTD[1, order], carry.gather(order), context)
    assert torch.equal(moved.expert_TK, routing.expert_TK[order])


def test_statistics_and_bias_belong_to_the_block_that_uses_the_plan():
    routers = build("deepseek_v3", bias_rate=0.5)
    routing, stats = run(routers, torch.randn(L, T, D, dtype=torch.float64))[2]
    assert torch.equal(stats.count_R, routing.count_R)
    assert stats.balance_loss == "sequence"
    routers[2].post_step(torch.tensor([9, 0, 0, 0, 0, 0]), T)
    assert routers[1].pre_gate.bias_R.tolist() == [-0.5] + [0.5] * 5
    assert not routers[2].pre_gate.bias_R.any()


def test_padding_stays_aligned_while_the_plan_waits():
    routers, x_LTD = build(), torch.randn(L, T, D, dtype=torch.float64)
    valid_T = torch.tensor([False, True, True, False, True, True])
    for (routing, stats), (alone, alone_stats) in zip(
        run(routers, x_LTD, RoutingContext(is_valid_T=valid_T)), run(routers, x_LTD[:, valid_T]), strict=True
    ):
        assert torch.equal(routing.expert_TK[valid_T], alone.expert_TK)
        assert (routing.expert_TK[~valid_T] == E).all()
        torch.testing.assert_close(stats.probability_TR, alone_stats.probability_TR)


def test_capacity_drops_of_the_plan_hold_where_it_is_used():
    routers = build("mixtral", capacity_factor=0.5)
    x_LTD = torch.randn(L, 32, D, dtype=torch.float64)
    for routing, stats in run(routers, x_LTD, RoutingContext(is_training=True)):
        assert stats.kept_R.max() <= 6
        assert stats.count_R.sum() == 64
        assert torch.equal(routing.count_R, stats.kept_R)


def test_recurrence_runs_in_the_order_in_which_gates_are_read(tolerance):
    """PreGate(Recurrent(nulls)): block 0 reads gates 0 and 1, block b gate b + 1; the plan is used one block later."""
    sizes = RouterSizes(width=D, num_experts=E, top_k=3, num_layers=3, zero_compute=("zero",) * 3)
    routers = build("rmoe", sizes=sizes, state_width=4, normalise_over="ffn", balance_loss="null_averaged")
    plain = build_routers("rmoe", sizes, {"state_width": 4, "normalise_over": "ffn"})
    gates = [gate_of(routers, block, 1) for block in range(3)]
    for base, gate in zip(plain, gates, strict=True):
        base.double().load_state_dict(gate.state_dict())
    x_LTD = torch.randn(3, T, D, dtype=torch.float64)
    read_LTD = torch.stack([x_LTD[0], x_LTD[0], x_LTD[1]])
    for (ours, stats), (base, _) in zip(run(routers, x_LTD), run(plain, read_LTD), strict=True):
        assert torch.equal(ours.expert_TK, base.expert_TK)
        torch.testing.assert_close(ours.weight_TK, base.weight_TK, **tolerance[torch.float64])
        assert stats.balance_loss == "null_averaged"


def test_trap_batched_plans_are_those_of_each_token_alone():
    """The published artifact recounts tokens per expert from the current gate, so batches disagree with one token."""
    routers, x_LTD = build(), torch.randn(L, T, D, dtype=torch.float64)
    together = run(routers, x_LTD)
    for t in range(T):
        for (routing, _), (alone, _) in zip(together, run(routers, x_LTD[:, t : t + 1]), strict=True):
            assert torch.equal(routing.expert_TK[t], alone.expert_TK[0])


def test_next_means_next_block_with_experts(tiny_config):
    model = MoEForCausalLM(tiny_config(router="pregate", num_dense_layers=1)).eval()
    assert [layer.router.layer for layer in model.model.moe_layers] == [0, 1]
    assert model(torch.randint(0, 96, (1, 5))).logits.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ahead": 5}, r"ahead must lie in 0\.\.4"),
        ({"ahead": -1}, "ahead must lie in"),
        ({"inner": "pregate"}, "raise `ahead` instead"),
        ({"inner": "hash"}, "reads token ids only"),
        ({"inner": "expert_choice"}, "cannot do"),
        ({"inner": "forced"}, "given beforehand"),
        ({"inner": "mixtrall"}, "did you mean 'mixtral'"),
        ({"inner_options": {"scale": 1.0, "groups": 2}}, "unknown router option 'groups'"),
        ({"inners": "mixtral"}, "did you mean 'inner'"),
    ],
)
def test_what_does_not_compose_is_refused_with_a_reason(options, message):
    with pytest.raises(ValueError, match=message):
        build_routers("pregate", RouterSizes(width=D, num_experts=E, top_k=K, num_layers=L), options)


def test_a_block_without_its_plan_says_which_block_was_left_out():
    with pytest.raises(ValueError, match="block 2 got no plan; block 1 must run before it"):
        build()[2](torch.randn(T, D, dtype=torch.float64), Carry(), RoutingContext())
