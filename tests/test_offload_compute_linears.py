"""Resident linear layers on single tokens: results unchanged, siblings multiplied together, nothing stale given out."""

import threading

import pytest
import torch
from torch import nn

from offload.compute.linears import SiblingLinears, TokenWeight, quicken_linears
from offload.compute.matvec import Matvecs


class Attention(nn.Module):
    def __init__(self, width=128):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, rows, bias=False) for rows in (width, 32, 32, width))

    def forward(self, x):
        q, k, v = self.q(x), self.k(x), self.v(x)
        return self.o(q * torch.cat([k, v, k, v], dim=-1))


class Counting(Matvecs):
    def __init__(self):
        super().__init__("fast")
        self.calls = []

    def multiply(self, x_nD, weights_FD, outs_nF, biases_F=()):
        self.calls.append(len(weights_FD))
        return super().multiply(x_nD, weights_FD, outs_nF, biases_F)


def random(*shape):
    return torch.randn(*shape).bfloat16()


def test_results_are_those_of_the_layers():
    torch.manual_seed(0)
    model = nn.Sequential(Attention(), nn.Linear(128, 32, bias=False)).bfloat16().requires_grad_(False)
    xs = [random(1, 1, 128), random(2, 5, 128), random(1, 128), random(128), random(1, 1, 128)]
    expected = [model(x) for x in xs]
    quicken_linears(model, Matvecs("exact"))
    for _ in range(3):
        assert all(torch.equal(model(x), right) for x, right in zip(xs, expected, strict=True))


def test_siblings_are_multiplied_together_once_they_are_known():
    model, matvecs = Attention().bfloat16().requires_grad_(False), Counting()
    quicken_linears(model, matvecs)
    if not matvecs._orders:
        pytest.skip("no C compiler")
    model(random(1, 1, 128))
    assert matvecs.calls == [1, 1, 1, 1]
    matvecs.calls.clear()
    model(random(1, 1, 128))
    assert matvecs.calls == [3, 1]


def test_a_sibling_that_is_not_asked_for_is_not_computed_forever():
    model, matvecs = Attention().bfloat16().requires_grad_(False), Counting()
    quicken_linears(model, matvecs)
    if not matvecs._orders:
        pytest.skip("no C compiler")
    model(random(1, 1, 128))
    for _ in range(2):
        model.q(random(1, 1, 128))
    matvecs.calls.clear()
    model.q(random(1, 1, 128))
    assert max(matvecs.calls) == 1


def test_an_input_that_is_changed_in_place_is_another_input():
    model = Attention().bfloat16().requires_grad_(False)
    quicken_linears(model, Matvecs("fast"))
    x = random(1, 1, 128)
    for _ in range(3):
        model(x)
    model.q(x)
    x.add_(1)
    torch.testing.assert_close(model.v(x), nn.functional.linear(x, model.v.weight), rtol=0.02, atol=0.02)


def test_other_types_are_left_to_the_layer():
    model = Attention().bfloat16().requires_grad_(False)
    quicken_linears(model, Matvecs("fast"))
    x = random(1, 1, 128)
    model(x)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model.q(x.float()), nn.functional.linear(x, model.q.weight), rtol=0.02, atol=0.02)
    with pytest.raises(RuntimeError, match="dtype"):
        model.q(x.float())


def test_gradients_go_through():
    linear = nn.Linear(16, 8, bias=False).bfloat16()
    group = SiblingLinears([linear], Matvecs("fast"))
    x = random(1, 16).requires_grad_()
    group(0, linear, x).sum().backward()
    assert x.grad is not None
    assert linear.weight.grad is not None


def test_threads_do_not_take_each_others_results():
    model = Attention().bfloat16().requires_grad_(False)
    xs = [random(1, 1, 128) for _ in range(4)]
    quicken_linears(model, Matvecs("fast"))
    expected, wrong = [model(x) for x in xs], []

    def run(number):
        for _ in range(100):
            if not torch.equal(model(xs[number]), expected[number]):
                wrong.append(number)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(xs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


class Gate(nn.Module):
    """Like the routers of transformers: a weight, and `linear` called by hand."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(32, 64, generator=torch.Generator().manual_seed(0)))

    def forward(self, x):
        return nn.functional.linear(x, self.weight)


def test_weights_that_modules_multiply_with_themselves():
    gate = Gate().bfloat16().requires_grad_(False)
    x_TD = torch.randn(3, 64).bfloat16()
    expected, single = gate(x_TD), gate(x_TD[:1])
    matvecs = Matvecs("exact")
    quicken_linears(gate, matvecs)
    assert torch.equal(gate(x_TD), expected)
    assert torch.equal(gate(x_TD[:1]), single)
    assert "32x64" in matvecs.names or not matvecs._orders
    assert type(gate.weight.float()) is torch.Tensor
    assert torch.equal(gate.weight + 1, gate.weight.data + 1)
    assert torch.equal(nn.functional.linear(x_TD[:1], weight=gate.weight), single)


def test_float32_products_of_bfloat16_weights_do_not_depend_on_the_number_of_rows(several_threads):
    """In the order of native/layers/router.c: column c goes to sum c % 64, and halves are added."""
    several_threads(1)
    generator = torch.Generator().manual_seed(0)
    weight_FD, x_nD = torch.randn(40, 200, generator=generator).bfloat16(), torch.randn(5, 200, generator=generator)
    weight = TokenWeight(weight_FD, Matvecs("fixed"))
    sums_nFC = torch.zeros(5, 40, 64)
    for columns in range(0, 200, 64):
        terms = x_nD[:, None, columns : columns + 64] * weight_FD[None, :, columns : columns + 64].float()
        sums_nFC[..., : terms.shape[2]] += terms
    while sums_nFC.shape[2] > 1:
        sums_nFC = sums_nFC[..., : sums_nFC.shape[2] // 2] + sums_nFC[..., sums_nFC.shape[2] // 2 :]
    expected_nF = sums_nFC[..., 0]
    for wide in (weight.float(), weight.to(torch.float32), weight.type(torch.float32)):
        assert torch.equal(nn.functional.linear(x_nD, wide), expected_nF)
        assert torch.equal(nn.functional.linear(x_nD[None, 2:3], wide, None), expected_nF[None, 2:3])
        assert (wide.dtype, wide.shape) == (torch.float32, (40, 200))
        assert torch.equal(torch.cat([wide + 1, wide]), torch.cat([weight_FD.float() + 1, weight_FD.float()]))
        bias_F, learning_nD = torch.ones(40), x_nD.clone().requires_grad_()
        plain = (bias_F, weight_FD.float())
        assert torch.equal(nn.functional.linear(x_nD, wide, bias_F), nn.functional.linear(x_nD, plain[1], bias_F))
        assert nn.functional.linear(learning_nD, wide).requires_grad
    assert type(TokenWeight(weight_FD, Matvecs("exact")).float()) is torch.Tensor
    assert type(weight.to(torch.float64)) is torch.Tensor
