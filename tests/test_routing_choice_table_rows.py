"""Products with picked rows of a table in C: equal to gathered ones, and the same bits for any number of threads."""

import pytest
import torch

import routing.choice.table_rows as table_rows
from routing import gather_dot, gather_sum


def products(x_TD, table_ND, row_TK, weight_TK):
    """Results and gradients of both products."""
    inputs = [tensor.clone().requires_grad_() for tensor in (x_TD, table_ND, weight_TK)]
    dot_TK, sum_TD = gather_dot(inputs[0], inputs[1], row_TK), gather_sum(inputs[2], inputs[1], row_TK)
    loss = (dot_TK * weight_TK).sum() + (sum_TD * x_TD).sum()
    return [dot_TK, sum_TD, *torch.autograd.grad(loss, inputs)]


@pytest.mark.parametrize(("T", "K", "N", "D"), [(1, 1, 1, 1), (3, 5, 7, 13), (40, 9, 50, 64), (9, 70, 3, 200)])
def test_c_equals_torch(T, K, N, D, monkeypatch):
    x, table, weight = torch.randn(T, D), torch.randn(N, D), torch.randn(T, K)
    row = torch.randint(N, (T, K))
    assert table_rows._kernels() is not None, "this machine has no C compiler"
    ours = products(x, table, row, weight)
    monkeypatch.setattr(table_rows, "_kernels", lambda: None)
    for a, b in zip(ours, products(x, table, row, weight), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_any_number_of_threads_gives_the_same_bits(several_threads):
    given = torch.randn(64, 32), torch.randn(20, 32), torch.randint(20, (64, 40)), torch.randn(64, 40)
    found = []
    for threads in (1, 2, 3):
        several_threads(threads)
        found.append(products(*given))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0][:1] + found[0][3:4], other[:1] + other[3:4], strict=True))


def test_other_layouts_and_rows_outside_of_the_table():
    x, table, row = torch.randn(6, 8).T.contiguous().T, torch.randn(8, 9).T[:, ::1], torch.randint(9, (5, 6)).T
    torch.testing.assert_close(gather_dot(x, table, row), (table[row] * x[:, None]).sum(-1))
    for bad in (-10, 9):
        with pytest.raises(IndexError, match="out of"):
            gather_dot(x, table, torch.full((6, 2), bad))
