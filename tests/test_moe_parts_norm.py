"""The norm of training on a CPU against torch's and against finite differences."""

import pytest
import torch
from torch.nn.functional import rms_norm

import moe.parts.cpu_training
import moe.parts.norm
from moe.parts.norm import RMSNorm


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(moe.parts.norm, "BLOCK_NUMBERS", 20)
    monkeypatch.setattr(moe.parts.cpu_training, "FEWEST_NUMBERS", 0)


def build(width, dtype, eps=1e-5):
    norm = RMSNorm(width, eps=eps).to(dtype)
    torch.nn.init.normal_(norm.weight)
    return norm


@pytest.mark.parametrize("shape", [(1, 8), (7, 8), (2, 5, 3), (2, 3, 4, 6), (0, 4)])
def test_value_and_gradients_are_those_of_torch(shape):
    norm = build(shape[-1], torch.float64)
    x, price = (torch.randn(shape, dtype=torch.float64) for _ in range(2))
    x.requires_grad_()
    found = norm(x)
    wanted = rms_norm(x, shape[-1:], norm.weight, 1e-5)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)
    inputs = (x, norm.weight)
    found_grads, wanted_grads = (torch.autograd.grad((y * price).sum(), inputs) for y in (found, wanted))
    torch.testing.assert_close(found_grads, wanted_grads, rtol=1e-11, atol=1e-13)


def test_gradients_are_those_of_finite_differences():
    norm = build(4, torch.float64, eps=0.1)
    x = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    parameters = dict(norm.named_parameters())
    call = torch.func.functional_call
    assert torch.autograd.gradcheck(lambda x, w: call(norm, parameters | {"weight": w}, (x,)), (x, norm.weight))


def test_a_row_of_zeros_has_a_finite_gradient():
    x = torch.zeros(2, 4, requires_grad=True)
    build(4, torch.float32)(x).sum().backward()
    assert x.grad.isfinite().all()


def test_inputs_of_a_transposed_layout():
    norm = build(6, torch.float64)
    x = torch.randn(2, 6, 5, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(norm(x.mT).square().sum(), x)
    (wanted,) = torch.autograd.grad(rms_norm(x.mT, (6,), norm.weight, 1e-5).square().sum(), x)
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-13)


def test_bfloat16_is_computed_in_float32_and_rounded_once():
    norm = build(16, torch.float32)
    x = torch.randn(12, 16).bfloat16().requires_grad_()
    found = norm(x)
    weight = norm.weight.detach().bfloat16().float()
    exact = x.detach().float().requires_grad_()
    wanted = rms_norm(exact, (16,), weight, 1e-5)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), wanted, rtol=2**-8, atol=0)
    price = torch.randn(12, 16).bfloat16()
    found.backward(price)
    wanted.backward(price.float())
    torch.testing.assert_close(x.grad.float(), exact.grad, rtol=2**-7, atol=2**-8)
    assert norm.weight.grad.dtype == torch.float32


def test_without_gradients_it_is_the_norm_of_torch_bit_by_bit():
    norm, x = build(8, torch.float32), torch.randn(5, 8)
    with torch.no_grad():
        assert torch.equal(norm(x), rms_norm(x, (8,), norm.weight, 1e-5))


def test_few_numbers_go_to_torch(monkeypatch):
    monkeypatch.setattr(moe.parts.cpu_training, "FEWEST_NUMBERS", 41)
    norm, x = build(8, torch.float32), torch.randn(5, 8)
    assert torch.equal(norm(x), rms_norm(x, (8,), norm.weight, 1e-5))


def test_only_what_asks_for_a_gradient_gets_one():
    norm = build(8, torch.float32).requires_grad_(False)
    x = torch.randn(5, 8, requires_grad=True)
    norm(x).sum().backward()
    assert norm.weight.grad is None
    assert x.grad is not None
