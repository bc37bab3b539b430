"""DeepSeek-V2's device and communication losses by hand and against loops over tokens, devices and experts."""

import pytest
import torch

from routing import Carry, ClassicRouter, RouterSizes, RoutingContext, auxiliary_loss, build_routers

D = 4


def build(num_experts=6, top_k=2, num_groups=3, groups_kept=2, **options):
    sizes = RouterSizes(width=D, num_experts=num_experts, top_k=top_k, num_layers=1)
    options = {"num_groups": num_groups, "groups_kept": groups_kept} | options
    router = build_routers("deepseek_v2", sizes, options)[0].double()
    router.init_parameters(1.0)
    return router


def softmax(values):
    exp = [v.exp() for v in values]
    return [v / sum(exp) for v in exp]


def losses_reference(probabilities, chosen, *, num_experts, num_groups, groups_kept):
    """Equations 23 to 31 as they stand: expert, device and communication loss without coefficients."""
    T, K, size = len(chosen), len(chosen[0]), num_experts // num_groups
    f = [num_experts / (K * T) * sum(e in row for row in chosen) for e in range(num_experts)]
    P = [sum(p[e] for p in probabilities) / T for e in range(num_experts)]
    expert = sum(f[e] * P[e] for e in range(num_experts))
    device = communication = 0
    for g in range(num_groups):
        members = range(g * size, (g + 1) * size)
        P_of_device = sum(P[e] for e in members)
        device = device + sum(f[e] for e in members) / size * P_of_device
        sent = num_groups / (groups_kept * T) * sum(any(e in members for e in row) for row in chosen)
        communication = communication + sent * P_of_device
    return expert, device, communication


@pytest.mark.parametrize("padding", [False, True])
def test_three_losses_and_every_gradient_equal_the_plain_loop(padding, tolerance):
    T, E, K = 11, 6, 2
    router = build()
    x_TD = torch.randn(T, D, dtype=torch.float64, requires_grad=True)
    valid_T = torch.arange(T) % 3 != 1 if padding else torch.ones(T, dtype=torch.bool)
    _, _, stats = router(x_TD, Carry(), RoutingContext(is_training=True, is_valid_T=valid_T if padding else None))
    loss = auxiliary_loss([stats], balance_weight=0.003, z_weight=0.0)
    loss.backward()

    x, weight = x_TD.detach().clone().requires_grad_(), router.weight.detach().clone().requires_grad_()
    tokens = [t for t in range(T) if valid_T[t]]
    probabilities = [softmax([(x[t] * weight[e]).sum() for e in range(E)]) for t in tokens]
    chosen = []
    for p in probabilities:
        value = [v.item() for v in p]
        devices = sorted(range(3), key=lambda g, value=value: -max(value[2 * g : 2 * g + 2]))[:2]
        allowed = [e for g in devices for e in (2 * g, 2 * g + 1)]
        chosen.append(sorted(allowed, key=lambda e, value=value: -value[e])[:K])
    expert, device, communication = losses_reference(probabilities, chosen, num_experts=E, num_groups=3, groups_kept=2)
    reference = 0.003 * expert + 0.05 * device + 0.02 * communication
    torch.testing.assert_close(loss, reference, **tolerance[torch.float64])
    reference.backward()
    torch.testing.assert_close(x_TD.grad, x.grad, **tolerance[torch.float64])
    torch.testing.assert_close(router.weight.grad, weight.grad, **tolerance[torch.float64])


def test_each_loss_is_one_when_uniform_and_grows_with_its_own_fault():
    """Logits of zero: the probabilities are uniform, so the loss is 1 whatever the loads are."""
    x_TD = torch.randn(5, D, dtype=torch.float64)
    for options, expected in (
        ({"communication_weight": 0.0}, 0.05),
        ({"device_weight": 0.0, "groups_kept": 1}, 0.02),
    ):
        router = build(**options)
        with torch.no_grad():
            router.weight.zero_()
        _, _, stats = router(x_TD, Carry(), RoutingContext())
        assert stats.penalty_T.mean().item() == pytest.approx(expected)


def test_without_groups_there_are_no_devices():
    sizes = RouterSizes(width=D, num_experts=6, top_k=2, num_layers=1)
    router = build_routers("deepseek_v2", sizes)[0]
    assert type(router) is ClassicRouter
    _, _, stats = router(torch.randn(3, D), Carry(), RoutingContext())
    assert stats.penalty_T is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_groups": 1, "groups_kept": 1, "device_weight": 0.1}, "give num_groups above 1"),
        ({"device_weight": -1.0}, "must not be negative"),
        ({"num_groups": 4}, "6 experts do not divide into 4 groups"),
        ({"device_wait": 1.0}, "did you mean 'device_weight'"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)
