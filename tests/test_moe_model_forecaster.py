"""Forecasters of series: equations by loops with every gradient, causality, the schedule of heads, learning."""

import pytest
import torch
from torch.nn.functional import silu

from moe import Forecaster
from moe.experts.reference import swiglu_experts_reference
from routing import Carry, RoutingContext

TIME_MOE = {"architecture": "time_moe", "num_shared_experts": 1, "vocab_size": 1}


@pytest.fixture
def forecaster(tiny_config):
    return Forecaster(tiny_config(**TIME_MOE), horizons=(1, 3, 5)).double().eval()


def test_the_layer_equals_plain_loops_with_every_gradient(forecaster, tolerance):
    layer = forecaster.model.moe_layers[0]
    x_TD = torch.randn(7, 32).double().requires_grad_()
    ours, _, _ = layer(x_TD, Carry(), RoutingContext())
    share = (x_TD @ layer.router.weight.T).softmax(-1)
    weight_TK, expert_TK = share.topk(2)
    experts = layer.experts
    plain = swiglu_experts_reference(x_TD, expert_TK, weight_TK, experts.gate_up_proj, experts.down_proj)
    network, rows = layer.shared.network, []
    for x in x_TD:
        gate = 1 / (1 + torch.exp(-(layer.shared.gate.weight[0] * x).sum()))
        hidden = silu(network.gate_proj.weight @ x) * (network.up_proj.weight @ x)
        rows.append(gate * (network.down_proj.weight @ hidden))
    expected = plain + torch.stack(rows)
    torch.testing.assert_close(ours, expected, **tolerance[torch.float64])
    inputs, seed = [x_TD, *layer.parameters()], torch.randn_like(ours)
    for a, b in zip(*(torch.autograd.grad((y * seed).sum(), inputs) for y in (ours, expected)), strict=True):
        torch.testing.assert_close(a, b, **tolerance[torch.float64])


def test_a_shared_expert_is_needed(tiny_config):
    with pytest.raises(ValueError, match="num_shared_experts must be at least 1; got 0"):
        Forecaster(tiny_config(**TIME_MOE | {"num_shared_experts": 0}))
    with pytest.raises(ValueError, match="horizons must rise from 1"):
        Forecaster(tiny_config(**TIME_MOE), horizons=(8, 1))


def test_the_loss_is_the_mean_over_heads_of_every_huber_error(forecaster, tolerance):
    series = torch.randn(2, 9).double() * 3
    made, total = forecaster(series[:, :-1]), 0.0
    for head, horizon in zip(made, (1, 3, 5), strict=True):
        errors = []
        for b in range(2):
            for s in range(8):
                for ahead in range(horizon):
                    if s + horizon < 9:
                        error = (head[b, s, ahead] - series[b, s + 1 + ahead]).abs()
                        errors.append(0.5 * error**2 if error < 2 else 2 * (error - 1))
        total = total + torch.stack(errors).mean() / 3
    ours = forecaster.loss(series)
    torch.testing.assert_close(ours, total, **tolerance[torch.float64])
    parameters = [p for name, p in forecaster.named_parameters() if "embed_tokens" not in name]
    for a, b in zip(*(torch.autograd.grad(loss, parameters, retain_graph=True) for loss in (ours, total)), strict=True):
        torch.testing.assert_close(a, b, **tolerance[torch.float64])
    with pytest.raises(ValueError, match="longer than 5 values; got 5"):
        forecaster.loss(series[:, :5])


def test_later_values_change_nothing_before_them(forecaster):
    series = torch.randn(1, 10).double()
    changed = series.clone()
    changed[0, 6] += 1
    for before, after in zip(forecaster(series), forecaster(changed), strict=True):
        torch.testing.assert_close(before[:, :6], after[:, :6])
        assert not torch.allclose(before[:, 6:], after[:, 6:])


def test_a_forecast_is_made_of_the_longest_heads_that_fit(forecaster):
    series = torch.randn(2, 6).double()
    mean, deviation = series.mean(1, keepdim=True), series.std(1, keepdim=True, correction=0)
    seen = (series - mean) / deviation
    for head in (2, 2, 1, 0):  # 14 = 5 + 5 + 3 + 1
        seen = torch.cat([seen, forecaster(seen)[head][:, -1]], dim=1)
    torch.testing.assert_close(forecaster.forecast(series, 14), seen[:, 6:] * deviation + mean)
    shifted = forecaster.forecast(series * 7 + 100, 14)
    torch.testing.assert_close(shifted, forecaster.forecast(series, 14) * 7 + 100, rtol=1e-8, atol=1e-8)


def test_it_learns_a_period(tiny_config):
    model = Forecaster(tiny_config(**TIME_MOE, num_hidden_layers=2), horizons=(1, 4)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    phase = torch.rand(16, 1) * 6
    series = torch.sin(torch.arange(24) * 0.8 + phase)
    losses = []
    for _ in range(40):
        loss = model.loss(series)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
