"""Routers that train on lots or on whole batches: forward and every gradient against plain loops, in float64.

The loops draw the same lots in the same order, and know nothing of the routers but the papers' formulas.
"""

import itertools
import math

import pytest
import torch

from routing import BALANCE_LOSSES, Carry, RouterSizes, RoutingContext, build_routers

D = 4


def build(name, *, top_k, num_experts=4, **options):
    sizes = RouterSizes(width=D, num_experts=num_experts, top_k=top_k, num_layers=1)
    router = build_routers(name, sizes, options)[0].double()
    router.init_parameters(1.0)
    return router


def train_step(router, x_TD, price_TR, balance_weight, seed):
    """One training call: its routing, and the gradients of the priced weights plus the balance loss."""
    x_TD = x_TD.clone().requires_grad_()
    torch.manual_seed(seed)
    routing, _, stats = router(x_TD, Carry(), RoutingContext(is_training=True))
    padded_TR = torch.nn.functional.pad(price_TR, (0, 1))
    loss = (routing.weight_TK * padded_TR.gather(1, routing.expert_TK)).sum()
    loss = loss + balance_weight * BALANCE_LOSSES[stats.balance_loss](stats)
    loss.backward()
    return routing, loss, x_TD.grad, router.weight.grad


def leaves(router, x_TD):
    x, weight = x_TD.clone().requires_grad_(), router.weight.detach().clone().requires_grad_()
    logits = [[sum(x[t, d] * row[d] for d in range(D)) for row in weight] for t in range(len(x))]
    return x, weight, logits


def softmax(values):
    exp = [v.exp() for v in values]
    return [v / sum(exp) for v in exp]


def best(values, k):
    return sorted(range(len(values)), key=lambda e: -float(values[e].detach()))[:k]


def sigmoid(value):
    return 1 / (1 + (-value).exp())


def expect_same(found, weights_of_tokens, price_TR, balance, leaf_x, leaf_weight, tolerance):
    """Compare a training call with {expert: weight} per token and a balance term of the loop."""
    routing, loss, x_grad, weight_grad = found
    for t, weights in enumerate(weights_of_tokens):
        slots = zip(routing.expert_TK[t].tolist(), routing.weight_TK[t].tolist(), strict=True)
        assert {e: w for e, w in slots if e < routing.empty_id} == pytest.approx(
            {e: w.item() for e, w in weights.items()}
        )
    reference = sum(w * price_TR[t, e] for t, weights in enumerate(weights_of_tokens) for e, w in weights.items())
    reference = reference + balance
    reference.backward()
    torch.testing.assert_close(loss, reference, **tolerance)
    torch.testing.assert_close(x_grad, leaf_x.grad, **tolerance)
    torch.testing.assert_close(weight_grad, leaf_weight.grad, **tolerance)


@pytest.mark.parametrize("factor", [0.5, 1.0, 100.0])
@pytest.mark.parametrize("seed", range(3))
def test_gshard_training_equals_algorithm_1(factor, seed, tolerance):
    """Capacity 2 cf T / E of the whole batch; a second choice that lost its lot takes no place in the queue."""
    T, E = 11, 4
    router = build("gshard", top_k=2, capacity_factor=factor)
    x_TD, price_TR = torch.randn(T, D, dtype=torch.float64), torch.randn(T, E, dtype=torch.float64)
    found = train_step(router, x_TD, price_TR, 0.3, seed)

    torch.manual_seed(seed)
    lot_T = torch.rand(T, dtype=torch.float64).tolist()
    x, weight, logits = leaves(router, x_TD)
    gates = [softmax(row) for row in logits]
    capacity = math.ceil(2 * factor * T / E)
    taken, kept, first_of = [0] * E, [{} for _ in range(T)], []
    for t, p in enumerate(gates):
        one, two = best(p, 2)
        first_of.append(one)
        if taken[one] < capacity:
            taken[one] += 1
            kept[t][one] = p[one] / (p[one] + p[two])
    for t, p in enumerate(gates):
        one, two = best(p, 2)
        second = p[two] / (p[one] + p[two])
        if lot_T[t] < 2 * float(second.detach()) and taken[two] < capacity:
            taken[two] += 1
            kept[t][two] = second
    balance = E * sum(first_of.count(e) / T * sum(p[e] for p in gates) / T for e in range(E))
    expect_same(found, kept, price_TR, 0.3 * balance, x, weight, tolerance[torch.float64])


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("seed", range(3))
def test_sigma_moe_training_equals_the_plain_loop(dropout, seed, tolerance):
    """Sigmoid weights of the best visible experts; the regulariser is the negative entropy of the mean softmax."""
    T, E, K = 9, 5, 2
    router = build("sigma_moe", top_k=K, num_experts=E, expert_dropout=dropout)
    x_TD, price_TR = torch.randn(T, D, dtype=torch.float64), torch.randn(T, E, dtype=torch.float64)
    found = train_step(router, x_TD, price_TR, 0.7, seed)

    torch.manual_seed(seed)
    lot_TE = torch.rand(T, E, dtype=torch.float64).tolist() if dropout else [[1.0] * E] * T
    x, weight, logits = leaves(router, x_TD)
    kept = []
    for t, row in enumerate(logits):
        visible = [e for e in range(E) if lot_TE[t][e] >= dropout]
        chosen = sorted(visible, key=lambda e, row=row: -float(row[e].detach()))[:K]
        kept.append({e: sigmoid(row[e]) for e in chosen})
    probabilities = [softmax(row) for row in logits]
    mean = [sum(p[e] for p in probabilities) / T for e in range(E)]
    balance = sum(m * m.log() for m in mean)
    expect_same(found, kept, price_TR, 0.7 * balance, x, weight, tolerance[torch.float64])


def sinkhorn_loop(cost, tolerance=1e-4):
    """Megatron-LM's loop on plain lists: rows to 1 / T, columns to 1 / E, until the column factors stand still."""
    T, E = len(cost), len(cost[0])
    row_of, column_of, before = [1.0] * T, [1.0] * E, None
    while before is None or sum(abs(a - b) for a, b in zip(before, column_of, strict=True)) / E > tolerance:
        before = column_of
        row_of = [1 / T / sum(column_of[e] * cost[t][e] for e in range(E)) for t in range(T)]
        column_of = [1 / E / sum(row_of[t] * cost[t][e] for t in range(T)) for e in range(E)]
    return [[row_of[t] * cost[t][e] * column_of[e] for e in range(E)] for t in range(T)]


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_sinkhorn_training_equals_the_plain_loop(top_k, seed, tolerance):
    """The plan selects and has no gradient; the raw gate weighs and has one."""
    T, E = 13, 4
    torch.manual_seed(100 + seed)
    router = build("sinkhorn", top_k=top_k)
    x_TD, price_TR = torch.randn(T, D, dtype=torch.float64), torch.randn(T, E, dtype=torch.float64)
    found = train_step(router, x_TD, price_TR, 1.0, seed)

    x, weight, logits = leaves(router, x_TD)
    plan = sinkhorn_loop([[math.exp(float(v.detach())) for v in row] for row in logits])
    kept = []
    for row, shares in zip(logits, plan, strict=True):
        gate = [sigmoid(v) for v in row] if top_k == 1 else softmax(row)
        kept.append({e: gate[e] for e in sorted(range(E), key=lambda e, shares=shares: -shares[e])[:top_k]})
    expect_same(found, kept, price_TR, 0.0, x, weight, tolerance[torch.float64])


@pytest.mark.parametrize("seed", range(3))
def test_base_training_equals_the_best_of_all_balanced_assignments(seed, tolerance):
    T, E = 6, 3
    torch.manual_seed(100 + seed)
    router = build("base", top_k=1, num_experts=E)
    x_TD, price_TR = torch.randn(T, D, dtype=torch.float64), torch.randn(T, E, dtype=torch.float64)
    found = train_step(router, x_TD, price_TR, 1.0, seed)

    x, weight, logits = leaves(router, x_TD)
    balanced = (one for one in itertools.product(range(E), repeat=T) if all(one.count(e) == T // E for e in range(E)))
    chosen = max(balanced, key=lambda one: sum(float(logits[t][e].detach()) for t, e in enumerate(one)))
    kept = [{e: sigmoid(logits[t][e])} for t, e in enumerate(chosen)]
    expect_same(found, kept, price_TR, 0.0, x, weight, tolerance[torch.float64])


@pytest.mark.parametrize(
    ("name", "top_k"), [("gshard", 2), ("sigma_moe", 2), ("sinkhorn", 1), ("sinkhorn", 2), ("base", 1)]
)
def test_outside_training_they_are_greedy_with_the_same_gradients_as_the_plain_rule(name, top_k, tolerance):
    T, E = 7, 4
    router = build(name, top_k=top_k)
    x_TD, price_TR = torch.randn(T, D, dtype=torch.float64).requires_grad_(), torch.randn(T, E, dtype=torch.float64)
    routing, _, _ = router(x_TD, Carry(), RoutingContext())
    (routing.weight_TK * price_TR.gather(1, routing.expert_TK)).sum().backward()

    x, weight, logits = leaves(router, x_TD.detach())
    total = 0
    for t, row in enumerate(logits):
        chosen = best(row, top_k)
        assert routing.expert_TK[t].tolist() == chosen
        gate = softmax(row) if name == "gshard" or (name == "sinkhorn" and top_k == 2) else [sigmoid(v) for v in row]
        divisor = sum(gate[e] for e in chosen) if name == "gshard" else 1
        total = total + sum(gate[e] / divisor * price_TR[t, e] for e in chosen)
    total.backward()
    torch.testing.assert_close(x_TD.grad, x.grad, **tolerance[torch.float64])
    torch.testing.assert_close(router.weight.grad, weight.grad, **tolerance[torch.float64])
