"""RMoE against the GRU equations written out token by token; its ablations; its shared cell."""

import math

import pytest
import torch

from moe import MoEForCausalLM
from routing import RouterSizes, RoutingContext, build_routers

T, D, E, K, L, P = 5, 4, 6, 2, 3, 3


def build(**options):
    sizes = RouterSizes(width=D, num_experts=E, top_k=K, num_layers=L)
    routers = [router.double() for router in build_routers("rmoe", sizes, {"state_width": P} | options)]
    for router in routers:
        router.init_parameters(1.0)
    for parameter in routers[0].cell.parameters():
        torch.nn.init.normal_(parameter)
    return routers


def run(routers, x_LTD):
    carry, results = routers[0].begin(RoutingContext()), []
    for router, x_TD in zip(routers, x_LTD, strict=True):
        routing, carry, stats = router(x_TD, carry, RoutingContext())
        results.append((routing, stats))
    return results


def sigmoid(v):
    return 1 / (1 + (-v).exp())


def reference_logits(parameters, x_LTD, recurrence):
    """logit[l][t][e] by Eq. 3 with the gate order of PyTorch (r, z, n), one scalar at a time."""
    cell = parameters["cell"]
    logits = []
    for t in range(T):
        h = [torch.zeros((), dtype=torch.float64)] * P
        rows = []
        for layer in range(L):
            projection, gate = parameters["projection"][layer], parameters["weight"][layer]
            x = [sum(projection[i, d] * x_LTD[layer, t, d] for d in range(D)) for i in range(P)]
            if recurrence == "none":
                h = [torch.zeros((), dtype=torch.float64)] * P
            if recurrence == "detach":
                h = [v.detach() for v in h]
            of_x = [sum(cell["weight_ih"][j, i] * x[i] for i in range(P)) + cell["bias_ih"][j] for j in range(3 * P)]
            of_h = [sum(cell["weight_hh"][j, i] * h[i] for i in range(P)) + cell["bias_hh"][j] for j in range(3 * P)]
            r = [sigmoid(of_x[i] + of_h[i]) for i in range(P)]
            z = [sigmoid(of_x[P + i] + of_h[P + i]) for i in range(P)]
            n = [torch.tanh(of_x[2 * P + i] + r[i] * of_h[2 * P + i]) for i in range(P)]
            h = [(1 - z[i]) * n[i] + z[i] * h[i] for i in range(P)]
            rows.append(torch.stack([sum(gate[e, i] * h[i] for i in range(P)) for e in range(E)]))
        logits.append(torch.stack(rows))
    return torch.stack(logits, dim=1)


@pytest.mark.parametrize("recurrence", ["full", "detach", "none"])
def test_forward_and_every_gradient_equal_the_plain_loop(recurrence, tolerance):
    routers = build(recurrence=recurrence)
    x_LTD = torch.randn(L, T, D, dtype=torch.float64, requires_grad=True)
    price_LTE = torch.randn(L, T, E, dtype=torch.float64)
    results = run(routers, x_LTD)
    logit_LTE = torch.stack([stats.logit_TR for _, stats in results])
    loss = sum(
        (routing.weight_TK * price_TE.gather(1, routing.expert_TK)).sum()
        for (routing, _), price_TE in zip(results, price_LTE, strict=True)
    )
    loss.backward()

    copy = {
        "cell": {name: p.detach().clone().requires_grad_() for name, p in routers[0].cell.named_parameters()},
        "projection": [router.projection.detach().clone().requires_grad_() for router in routers],
        "weight": [router.weight.detach().clone().requires_grad_() for router in routers],
    }
    x = x_LTD.detach().clone().requires_grad_()
    reference = reference_logits(copy, x, recurrence)
    torch.testing.assert_close(logit_LTE, reference, **tolerance[torch.float64])
    total = 0
    for layer, (routing, _) in enumerate(results):
        for t in range(T):
            chosen = sorted(range(E), key=lambda e: -float(reference[layer, t, e].detach()))[:K]
            assert routing.expert_TK[t].tolist() == chosen
            exp = [reference[layer, t, e].exp() for e in chosen]
            total = total + sum(v / sum(exp) * price_LTE[layer, t, e] for v, e in zip(exp, chosen, strict=True))
    total.backward()
    torch.testing.assert_close(x_LTD.grad, x.grad, **tolerance[torch.float64])
    for router, projection, weight in zip(routers, copy["projection"], copy["weight"], strict=True):
        torch.testing.assert_close(router.projection.grad, projection.grad, **tolerance[torch.float64])
        torch.testing.assert_close(router.weight.grad, weight.grad, **tolerance[torch.float64])
    for name, parameter in routers[0].cell.named_parameters():
        torch.testing.assert_close(parameter.grad, copy["cell"][name].grad, **tolerance[torch.float64])


@pytest.mark.parametrize(("recurrence", "reaches_back"), [("full", True), ("detach", False), ("none", False)])
def test_gradient_of_a_layer_reaches_earlier_projections_only_with_full_recurrence(recurrence, reaches_back):
    routers = build(recurrence=recurrence)
    results = run(routers, torch.randn(L, T, D, dtype=torch.float64))
    results[-1][1].logit_TR.square().sum().backward()
    grads = [router.projection.grad for router in routers]
    assert grads[-1].any()
    assert all(grad is not None and bool(grad.any()) for grad in grads[:-1]) is reaches_back


@pytest.mark.parametrize(("recurrence", "depends"), [("full", True), ("detach", True), ("none", False)])
def test_without_recurrence_a_layer_does_not_see_earlier_ones(recurrence, depends):
    routers = build(recurrence=recurrence)
    x_LTD = torch.randn(L, T, D, dtype=torch.float64)
    before = run(routers, x_LTD)[-1][1].logit_TR
    x_LTD[0] += 1
    after = run(routers, x_LTD)[-1][1].logit_TR
    assert bool((before != after).any()) is depends


def test_trap_recurrence_runs_over_layers_not_tokens():
    """A public third-party version runs the GRU along the sequence; here a token's state never sees another token."""
    routers = build()
    x_LTD = torch.randn(L, T, D, dtype=torch.float64)
    before = run(routers, x_LTD)[-1][1].logit_TR
    x_LTD[:, 0] += 1
    after = run(routers, x_LTD)[-1][1].logit_TR
    assert torch.equal(before[1:], after[1:])
    assert (before[0] != after[0]).any()


def test_trap_released_cell_is_uninitialised(tiny_config):
    """Its tensors are torch.empty and no hook covers them: here matrices get the initialiser's spread, biases zero."""
    torch.manual_seed(0)
    model = MoEForCausalLM(tiny_config(router="rmoe", initializer_range=0.02))
    router = model.model.moe_layers[0].router
    for parameter in (router.cell.weight_ih, router.cell.weight_hh, router.projection, router.weight):
        assert parameter.std().item() == pytest.approx(0.02, rel=0.15)
    assert not router.cell.bias_ih.any()
    assert not router.cell.bias_hh.any()


def test_dense_first_layers_do_not_touch_the_state(tiny_config):
    model = MoEForCausalLM(tiny_config(router="rmoe", num_dense_layers=1)).train()
    token_BS = torch.randint(0, 96, (2, 8))
    model(token_BS, labels=token_BS).loss.backward()
    assert model.model.moe_layers[0].router.cell.weight_ih.grad.any()


def test_shared_cell_is_saved_once_and_counted_once(tiny_config, tmp_path):
    plain, recurrent = (MoEForCausalLM(tiny_config(router=name)) for name in ("mixtral", "rmoe"))
    p, d, layers, experts = 128, 32, 3, 6
    added = layers * p * d + 6 * p * p + 6 * p + layers * p * experts - layers * d * experts
    assert recurrent.num_parameters() - plain.num_parameters() == added
    recurrent.save_pretrained(tmp_path)
    names = [name for name in recurrent.state_dict() if ".cell." in name]
    assert sorted(name.rsplit(".", 1)[1] for name in names) == ["bias_hh", "bias_ih", "weight_hh", "weight_ih"]


def test_state_outlives_deepcopy():
    from copy import deepcopy

    routers = torch.nn.ModuleList(build())
    copied = deepcopy(routers)
    assert copied[2]._shared[0] is copied[0].cell
    assert copied[0].cell is not routers[0].cell


def test_published_parameter_count():
    """+0.43 M for 8 layers, d = 352, 16 experts, p = 128."""
    sizes = RouterSizes(width=352, num_experts=16, top_k=2, num_layers=8)
    recurrent, plain = (
        sum(p.numel() for router in build_routers(name, sizes) for p in router.parameters())
        for name in ("rmoe", "mixtral")
    )
    assert math.isclose((recurrent - plain) / 1e6, 0.43, abs_tol=0.01)


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="recurrence must be one of full, detach, none"):
        build(recurrence="half")
    with pytest.raises(ValueError, match="state_width"):
        build(state_width=0)
    with pytest.raises(ValueError, match="did you mean 'recurrence'"):
        build(recurence="none")


@pytest.mark.parametrize("recurrence", ["full", "detach", "none"])
def test_blocks_without_gradient_give_what_training_gives(recurrence, monkeypatch, tolerance):
    monkeypatch.setattr("routing.choice.gru.BLOCK_ROWS", 2)
    monkeypatch.setattr("routing.choice.gru.FEWEST_ROWS", 1)
    routers, x_LTD = build(recurrence=recurrence), torch.randn(L, T, D, dtype=torch.float64)
    expected = run(routers, x_LTD)
    with torch.no_grad():
        for (found, stats), (wanted, wanted_stats) in zip(run(routers, x_LTD), expected, strict=True):
            torch.testing.assert_close(stats.logit_TR, wanted_stats.logit_TR, **tolerance[torch.float64])
            assert torch.equal(found.expert_TK, wanted.expert_TK)
            torch.testing.assert_close(found.weight_TK, wanted.weight_TK, **tolerance[torch.float64])
