"""The blockwise GRU cell against torch's: values, every gradient, blocks that do not divide, no state before."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import routing.choice.gru
from routing.choice.gru import gru_cell

BLOCK = 4
NAMES = ("x", "state", "weight_ih", "weight_hh", "bias_ih", "bias_hh")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(routing.choice.gru, "BLOCK_ROWS", BLOCK)
    monkeypatch.setattr(routing.choice.gru, "FEWEST_ROWS", 1)


def leaves(T, p, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((T, p), (T, p), (3 * p, p), (3 * p, p), (3 * p,), (3 * p,))
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def results(step, inputs):
    after = step(*inputs)
    price = torch.randn(after.shape, generator=torch.Generator().manual_seed(9), dtype=after.dtype)
    return after, torch.autograd.grad((after * price).sum(), inputs, materialize_grads=True)


def ours(x, state, *weights):
    return gru_cell(x, state, weights)


@settings(max_examples=25, deadline=None)
@given(T=st.integers(1, 3 * BLOCK), p=st.integers(1, 5), seed=st.integers(0, 1000))
def test_value_and_every_gradient_are_those_of_torch(T, p, seed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(routing.choice.gru, "BLOCK_ROWS", BLOCK)
        patch.setattr(routing.choice.gru, "FEWEST_ROWS", 1)
        found, found_grads = results(ours, leaves(T, p, seed))
    wanted, wanted_grads = results(torch.gru_cell, leaves(T, p, seed))
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    for name, grad, grad_wanted in zip(NAMES, found_grads, wanted_grads, strict=True):
        torch.testing.assert_close(grad, grad_wanted, rtol=1e-10, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


def test_no_state_is_a_zero_state_and_the_state_matrix_then_has_a_zero_gradient():
    x, _, *weights = leaves(6, 3)
    found, found_grads = results(lambda x, *w: gru_cell(x, None, w), [x, *weights])
    wanted, wanted_grads = results(lambda x, *w: torch.gru_cell(x, torch.zeros_like(x), *w), [x, *weights])
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(found_grads, wanted_grads)
    gru_cell(x, None, weights).sum().backward()
    assert weights[1].grad is not None
    assert not weights[1].grad.any()


def test_gradients_are_those_of_finite_differences():
    assert torch.autograd.gradcheck(ours, leaves(5, 2))


def test_without_gradient_the_value_is_the_same_bits():
    inputs = leaves(2 * BLOCK + 1, 3, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(ours(*inputs), ours(*inputs))
    assert torch.equal(ours(*(value.detach() for value in inputs)), ours(*inputs))


def test_a_state_cut_off_from_its_past_gets_no_gradient():
    x, state, *weights = leaves(5, 3)
    gru_cell(x, state.detach(), weights).sum().backward()
    assert state.grad is None
    assert x.grad.any()
    assert weights[1].grad.any()


def test_saved_inputs_may_not_change_before_the_backward_pass():
    x, state, *weights = leaves(5, 3)
    after = gru_cell(x * 1, state, weights).sum()
    with torch.no_grad():
        weights[0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        after.backward()


def test_few_rows_go_to_torch(monkeypatch):
    monkeypatch.setattr(routing.choice.gru, "FEWEST_ROWS", 6)
    inputs = leaves(5, 3, dtype=torch.float32)
    assert torch.equal(ours(*inputs), torch.gru_cell(*inputs))
