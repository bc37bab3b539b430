"""Rows of one expert that are filled up while they are computed: the same outputs, and the same gradients."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import silu

from offload.compute.adapters import LowRank
from offload.compute.routed_rows import ExpertSpans
from offload.finetune.passing import rows as row_gradients
from offload.finetune.passing.rows import ROWS_STEP, Call, RowGradients, Seen, expert_rows, filled_rows

WIDTH, INNER = 24, 16
MODULE = SimpleNamespace(
    has_gate=True,
    has_bias=False,
    is_transposed=False,
    _apply_gate=lambda up: silu(up[..., :INNER]) * up[..., INNER:],
)


def leaf(*shape):
    return (torch.randn(shape) / shape[-1] ** 0.5).requires_grad_()


@pytest.mark.parametrize("rows", [1, ROWS_STEP - 1, ROWS_STEP, ROWS_STEP + 1])
def test_outputs_and_every_gradient_are_those_without_filling(rows):
    torch.manual_seed(rows)
    weights = {
        name: torch.randn(shape, dtype=torch.bfloat16) / 5
        for name, shape in {"gate_up_proj": (2 * INNER, WIDTH), "down_proj": (WIDTH, INNER)}.items()
    }
    factors = {"gate_up_proj": (leaf(2, WIDTH), leaf(2 * INNER, 2)), "down_proj": (leaf(2, INNER), leaf(WIDTH, 2))}
    seen = Seen(weights, {name: LowRank(a, b, 2.0) for name, (a, b) in factors.items()})
    x, grad = torch.randn(rows, WIDTH, dtype=torch.bfloat16).requires_grad_(), torch.randn(rows, WIDTH)
    leaves = [x, *(factor for pair in factors.values() for factor in pair)]
    found = []
    for compute in (expert_rows, filled_rows):
        out = compute(MODULE, 0, seen, x)
        found.append([out, *torch.autograd.grad(out.float(), leaves, grad)])
    # products of another number of rows add in another order
    for plain, filled in zip(*found, strict=True):
        torch.testing.assert_close(filled, plain, atol=0.02 * plain.abs().max().item(), rtol=0)


def test_the_number_of_rows_has_few_values_in_bfloat16_and_stays_elsewhere(monkeypatch):
    computed = []
    monkeypatch.setattr(row_gradients, "expert_rows", lambda module, expert, seen, x: computed.append(len(x)) or x)
    for dtype in (torch.bfloat16, torch.float32):
        for rows in (5, 32, 33):
            assert len(filled_rows(None, 0, None, torch.zeros(rows, 4, dtype=dtype))) == rows
    assert computed == [32, 32, 64, 5, 32, 33]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_frozen_matrices_give_the_same_gradients_without_the_last_product(dtype, is_transposed):
    torch.manual_seed(0)
    biases = {
        "gate_up_proj_bias": torch.randn(3, 2 * INNER, dtype=dtype),
        "down_proj_bias": torch.randn(3, WIDTH, dtype=dtype),
    }
    module = SimpleNamespace(**{**vars(MODULE), "has_bias": True, "is_transposed": is_transposed}, **biases)
    sizes = {"gate_up_proj": (2 * INNER, WIDTH), "down_proj": (WIDTH, INNER)}
    weights = {name: torch.randn(shape, dtype=dtype) / 5 for name, shape in sizes.items()}
    shown = {name: weight.t().contiguous() if is_transposed else weight for name, weight in weights.items()}
    expert_TK = torch.tensor([[0, 1], [2, 1], [1, 0]])
    weight_TK = torch.rand(3, 2, dtype=dtype)
    call = Call(*(torch.randn(3, WIDTH, dtype=dtype), expert_TK, weight_TK, torch.randn(3, WIDTH, dtype=dtype)))
    found = []
    for is_frozen in (False, True):
        torch.manual_seed(1)
        factors = {name: (leaf(2, shape[1]), leaf(shape[0], 2)) for name, shape in sizes.items()}
        seen = Seen(shown, {name: LowRank(a, b, 2.0) for name, (a, b) in factors.items()})
        rows = RowGradients(call, ExpertSpans(expert_TK, 3))
        for expert in rows.spans.of:
            if is_frozen:
                rows.pass_through_frozen(module, expert, seen)
            else:
                rows.pass_through(expert_rows, module, expert, seen)
            if expert == 1:
                found.append([factor.grad.clone() for pair in factors.values() for factor in pair])
            for factor in (factor for pair in factors.values() for factor in pair):
                factor.grad = None
        found[-1] += rows.inputs()
    share = 1e-6 if dtype == torch.float64 else 0.03
    for whole, frozen in zip(*found, strict=True):
        torch.testing.assert_close(frozen, whole, atol=share * whole.abs().max().item(), rtol=0)
