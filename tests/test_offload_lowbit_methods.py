"""Methods that quantise: against naive versions, brute force and what they promise to lower."""

import itertools

import pytest
import torch

from offload.codes.schemes import Scheme
from offload.lowbit.methods import compensation
from offload.lowbit.methods.compensation import balancing_scales, gptq, second_moment
from offload.lowbit.methods.rounding import EXPONENT, hqq, least_squares, rtn

INT2, INT4 = Scheme("int2", 32), Scheme("int4", 32)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(rows=256, columns=64):
    return drawn(rows, 8, seed=1) @ drawn(8, columns, seed=2) + 0.3 * drawn(rows, columns, seed=3)


def output_error(w_RC, found, x_NC):
    return float((x_NC @ (found.weight_RC - w_RC).T).square().sum())


def naive_gptq(w_RC, scheme, moment_CC):
    """Column by column with an explicit inverse that shrinks: the textbook form (Optimal Brain Quantization)."""
    diagonal = moment_CC.diagonal()
    scale_RC = least_squares(w_RC, scheme, "F32", diagonal).scale_RG.repeat_interleave(scheme.group, 1).double()
    order = torch.argsort(diagonal, descending=True, stable=True)
    damping = compensation.DAMPING * float(diagonal.mean())
    left = w_RC.double()
    inverse = torch.linalg.inv((moment_CC + damping * torch.eye(len(moment_CC)))[order][:, order].double())
    left, scale = left[:, order], scale_RC[:, order]
    numbers = torch.zeros_like(left)
    for column in range(left.shape[1]):
        numbers[:, column] = scheme.numbers(left[:, column], scale[:, column])
        error = (left[:, column] - numbers[:, column] * scale[:, column]) / inverse[0, 0]
        left[:, column:] -= error[:, None] * inverse[0]
        inverse = (inverse - torch.outer(inverse[:, 0], inverse[0]) / inverse[0, 0])[1:, 1:]
    return numbers[:, torch.argsort(order)]


def test_gptq_is_the_textbook_algorithm(monkeypatch):
    monkeypatch.setattr(compensation, "BLOCK_COLUMNS", 24)
    w_RC, x_NC = 0.1 * drawn(12, 64), correlated()
    moment_CC = second_moment(x_NC, torch.ones(len(x_NC)))
    found = gptq(w_RC, INT4, "F32", moment_CC)
    assert float((found.number_RC != naive_gptq(w_RC, INT4, moment_CC)).float().mean()) < 0.01


@pytest.mark.parametrize("scheme", [INT4, INT2, Scheme("mxfp4", 32), Scheme("fp8")], ids=lambda scheme: scheme.name)
def test_gptq_errs_less_on_correlated_inputs_than_the_nearest_codes(scheme):
    w_RC, x_NC = 0.1 * drawn(12, 64), correlated()
    found = gptq(w_RC, scheme, "BF16", second_moment(x_NC, torch.ones(len(x_NC))))
    assert output_error(w_RC, found, x_NC) < 0.6 * output_error(w_RC, rtn(w_RC, scheme, "BF16"), x_NC)


def test_gptq_bears_inputs_that_are_always_zero():
    x_NC = correlated()
    x_NC[:, ::2] = 0
    found = gptq(0.1 * drawn(4, 64), INT4, "BF16", second_moment(x_NC, torch.ones(len(x_NC))))
    assert found.weight_RC.isfinite().all()


def test_second_moment_weighs_rows():
    x_NC, weight_N = drawn(5, 3), torch.tensor([0.0, 1.0, 2.0, 0.5, 0.0])
    by_hand = sum(weight * torch.outer(row, row) for row, weight in zip(x_NC, weight_N, strict=True))
    assert torch.allclose(second_moment(x_NC, weight_N), by_hand, atol=1e-6)


@pytest.mark.parametrize("form", ["int2", "int3", "int4"])
def test_hqq_lowers_what_it_says(form):
    scheme = Scheme(form, 32, has_zero=True)
    w_RC = 0.02 * drawn(32, 64).abs().square() * drawn(32, 64, seed=4).sign()
    found = hqq(w_RC, scheme, "BF16")
    scale_RG1 = found.scale_RG[..., None]
    w_RGX = scheme.grouped(w_RC)
    zero_RG = -scheme.most - (w_RGX / scale_RG1).amin(-1)
    zero_RG = zero_RG.round().clamp(-scheme.most, scheme.most - 1) if scheme.rounds_zero else zero_RG.bfloat16().float()
    first_RGX = (scheme.numbers(w_RGX, scale_RG1, zero_RG[..., None]) - zero_RG[..., None]) * scale_RG1
    before = (w_RGX - first_RGX).abs().pow(EXPONENT).sum()
    after = (w_RC - found.weight_RC).abs().pow(EXPONENT).sum()
    assert after <= before
    assert scheme.rounds_zero or after < 0.99 * before


def test_least_squares_is_near_the_best_scale_of_a_fine_grid():
    w_RC, weight_C = drawn(1, 32), torch.rand(32, generator=torch.Generator().manual_seed(5))
    found = least_squares(w_RC, INT2, "F32", weight_C)

    def cost(scale):
        return float((weight_C * (w_RC - INT2.numbers(w_RC, torch.tensor(scale)) * scale).square()).sum())

    best = min(cost(sign * step / 500) for sign, step in itertools.product((-1, 1), range(1, 1500)))
    assert cost(found.scale_RG.item()) <= 1.1 * best


def test_balancing_helps_where_one_input_is_large():
    w_RC, x_NC = 0.1 * drawn(12, 64), drawn(128, 64, seed=6)
    x_NC[:, 7] *= 30
    moment_CC = second_moment(x_NC, torch.ones(128))
    factor_C = balancing_scales(w_RC, INT2, "BF16", moment_CC, x_NC.abs().mean(0))
    assert factor_C.argmax() == 7

    def error(factor_C):
        found = least_squares(w_RC * factor_C, INT2, "BF16", moment_CC.diagonal() / factor_C.square())
        return float((x_NC @ (found.weight_RC / factor_C - w_RC).T).square().sum())

    assert error(factor_C) < error(torch.ones(64))
