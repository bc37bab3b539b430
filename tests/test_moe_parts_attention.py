"""Rotary positions against multiplication of complex numbers, forward and backward."""

import pytest
import torch

import moe.parts.cpu_training
from moe.parts.attention import rotary_angles, rotate

B, H, S, A = 2, 3, 5, 8


@pytest.fixture(autouse=True, params=[0, 1 << 30], ids=["in place", "few numbers"])
def fewest_numbers(request, monkeypatch):
    monkeypatch.setattr(moe.parts.cpu_training, "FEWEST_NUMBERS", request.param)


def heads(dtype=torch.float64):
    """As attention has them: a transposed view of [B, S, H * A]."""
    return torch.randn(B, S, H * A, dtype=dtype).unflatten(-1, (H, A)).transpose(1, 2)


def angles(dtype=torch.float64):
    return tuple(angle.to(dtype) for angle in rotary_angles(torch.arange(S)[None], A, 100.0))


def turned_as_complex(x_BHSA, cos, sin):
    pair = torch.complex(*x_BHSA.chunk(2, dim=-1))
    turned = pair * torch.complex(cos[..., : A // 2], sin[..., : A // 2])
    return torch.cat((turned.real, turned.imag), dim=-1)


def test_pairs_are_turned_as_complex_numbers():
    x_BHSA, (cos, sin) = heads().requires_grad_(), angles()
    found = rotate(x_BHSA, cos, sin)
    torch.testing.assert_close(found, turned_as_complex(x_BHSA, cos, sin), rtol=1e-13, atol=1e-14)
    assert found.stride() == x_BHSA.stride()


def test_positions_of_each_sequence_of_its_own():
    cos, sin = (angle.double() for angle in rotary_angles(torch.arange(B * S).view(B, S), A, 100.0))
    x_BHSA = heads().requires_grad_()
    torch.testing.assert_close(rotate(x_BHSA, cos, sin), turned_as_complex(x_BHSA, cos, sin), rtol=1e-13, atol=1e-14)


def test_gradient_is_that_of_finite_differences():
    cos, sin = angles()
    assert torch.autograd.gradcheck(lambda x: rotate(x, cos, sin), heads().requires_grad_())


def test_gradient_turns_back():
    x_BHSA, price = heads().requires_grad_(), heads()
    # of full precision, so that the squares of cosine and sine add up to one
    turn = torch.rand(1, 1, S, A // 2, dtype=torch.float64).repeat(1, 1, 1, 2)
    (grad,) = torch.autograd.grad(rotate(x_BHSA, turn.cos(), turn.sin()), x_BHSA, price)
    torch.testing.assert_close(rotate(grad, turn.cos(), turn.sin()), price, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_angles_follow_the_dtype_of_what_they_turn(dtype):
    x_BHSA = heads(dtype)
    found = rotate(x_BHSA.requires_grad_(), *angles(torch.float32))
    assert found.dtype == dtype
    wanted = turned_as_complex(x_BHSA.float(), *angles(torch.float32))
    torch.testing.assert_close(found.float(), wanted, rtol=0, atol=0.05 if dtype == torch.bfloat16 else 1e-5)


def test_compiled_it_is_the_same():
    compiled = torch.compile(rotate, fullgraph=True, backend="aot_eager")
    x_BHSA = heads()
    torch.testing.assert_close(compiled(x_BHSA, *angles()), rotate(x_BHSA, *angles()), rtol=1e-13, atol=1e-14)
