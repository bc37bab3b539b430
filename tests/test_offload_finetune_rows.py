"""Rows of one expert that are filled up while they are computed: the same outputs, and the same gradients."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import silu

from offload.compute.adapters import LowRank
from offload.finetune.passing import experts
from offload.finetune.passing.experts import ROWS_STEP, Seen, expert_rows, filled_rows

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
    monkeypatch.setattr(experts, "expert_rows", lambda module, expert, seen, x: computed.append(len(x)) or x)
    for dtype in (torch.bfloat16, torch.float32):
        for rows in (5, 32, 33):
            assert len(filled_rows(None, 0, None, torch.zeros(rows, 4, dtype=dtype))) == rows
    assert computed == [32, 32, 64, 5, 32, 33]
