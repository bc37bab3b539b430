"""Products of a few rows: close to float64 whatever the shape, with the bits that each level promises."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from offload.compute.matvec import Matvecs
from offload.compute.orders import Order, orders
from offload.native.kernel_matrix import plain_matrix

SHAPES = [(64, 24), (40, 1000), (1, 1), (3, 31), (5, 33), (64, 128), (17, 300), (96, 2048), (2688, 2048), (2048, 1344)]


def operands(shape, seed=0, rows=1):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator).bfloat16()
    x = torch.randn(rows, shape[1], generator=generator).bfloat16()
    return x, weight, torch.empty(rows, shape[0], dtype=torch.bfloat16)


@pytest.mark.parametrize("rows", [1, 3, 16, 37])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("order", orders(), ids=lambda order: order.name)
def test_orders_against_float64(order, shape, rows):
    if not order.fits(shape):
        pytest.skip("AMX takes 32 rows and columns at a time")
    x, weight, out = operands(shape, rows=rows)
    bias = torch.randn(shape[0]).bfloat16()
    order.multiply(x, (plain_matrix(weight),), (out,), biases=(bias,))
    expected = x.double() @ weight.double().t() + bias.double()
    error = (out.double() - expected).abs()
    assert (error <= 2**-8 * expected.abs() + 1e-5 * shape[1]).all()


@pytest.mark.parametrize("shape", [(33, 65), (96, 2048), (576, 2880)])
@pytest.mark.parametrize("order", orders(), ids=lambda order: order.name)
def test_a_row_has_the_same_bits_however_many_are_computed_with_it(order, shape):
    if not order.fits(shape):
        pytest.skip("AMX takes 32 rows and columns at a time")
    x, weight, together = operands(shape, rows=67)
    order.multiply(x, (plain_matrix(weight),), (together,))
    for start, rows in ((0, 1), (5, 2), (7, 3), (1, 4), (20, 7), (9, 15), (30, 16), (11, 17), (34, 33)):
        alone = torch.empty(rows, shape[0], dtype=torch.bfloat16)
        order.multiply(x[start : start + rows], (plain_matrix(weight),), (alone,))
        assert torch.equal(alone, together[start : start + rows])


@pytest.mark.parametrize("rows", [1, 5, 16, 17, 40])
@pytest.mark.parametrize("name", ["amx", "avx512_bf16"])
def test_a_block_begins_a_fresh_sum(name, rows):
    orders_of_blocks = [order for order in orders() if order.name == name]
    if not orders_of_blocks:
        pytest.skip(f"no {name} here")
    # 2**29, ones that it swallows as they come, -2**29: only a sum of their own keeps the ones
    weight = torch.zeros(64, 192).bfloat16()
    weight[:, 0], weight[:, 64:128], weight[:, 191] = 2**29, 1, -(2**29)
    x = torch.ones(rows, 192).bfloat16()
    for block, expected in ((0, 0.0), (64, 64.0), (128, 0.0), (192, 0.0), (320, 0.0)):
        out = torch.empty(rows, 64).bfloat16()
        replace(orders_of_blocks[0], block=block).multiply(x, (plain_matrix(weight),), (out,))
        assert (out == expected).all(), block


def agrees_with_torch(shape, counts, *, is_turned, seed=0):
    """The numbers of rows for which an order was found, each tried on other numbers than the trial's."""
    room = torch.empty(shape[::-1]).bfloat16().t() if is_turned else torch.empty(shape).bfloat16()
    found = Matvecs("exact").rows_orders([room, room], counts)
    _, weight, _ = operands(shape, seed)
    room.copy_(weight)
    for count, chosen in found.items():
        if chosen is not None:
            x, _, out = operands(shape, seed, count)
            chosen[0].multiply(x, (plain_matrix(weight),), (out,))
            assert torch.equal(out, torch.mm(x, room.t())), (shape, count, is_turned, chosen[0])
    return {count for count, chosen in found.items() if chosen is not None}


@pytest.mark.parametrize("is_turned", [False, True])
@pytest.mark.parametrize("shape", [(576, 1408), (96, 2048), (17, 300)])
def test_several_rows_of_an_expert_have_the_bits_of_torch(shape, is_turned):
    agrees_with_torch(shape, (2, 7, 16, 33, 70), is_turned=is_turned)


@pytest.mark.slow
@pytest.mark.parametrize("is_turned", [False, True])
@pytest.mark.parametrize("shape", [(576, 2880), (2880, 576), (2880, 2880), (5760, 2880)])
def test_hundreds_of_rows_have_the_bits_of_torch(shape, is_turned):
    found = agrees_with_torch(shape, (*range(2, 20), 31, 48, 64, 65, 100, 200, 333, 600), is_turned=is_turned)
    if orders()[0].name == "amx" and shape[0] >= 2880:
        assert len(found) > 13


def test_an_order_that_torch_does_not_have_is_not_found():
    matvecs = Matvecs("exact")
    matvecs._orders = tuple(order for order in matvecs._orders if order.name not in ("amx", "avx512_bf16"))
    assert matvecs.rows_orders([torch.empty(64, 2048).bfloat16()], (5, 40)) == {5: None, 40: None}


@pytest.mark.parametrize("rows", [1, 2, 5, 16])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_exact_products_have_the_bits_of_torch(shape, has_bias, rows):
    matvecs = Matvecs("exact")
    for seed in range(5):
        x, weight, out = operands(shape, seed, rows)
        bias = torch.randn(shape[0]).bfloat16() if has_bias else None
        if matvecs.multiply(x, (weight,), (out,), (bias,)):
            assert torch.equal(out, nn.functional.linear(x, weight, bias))
            assert has_bias or torch.equal(out, x @ weight.t())


def test_several_products_at_once_are_those_one_by_one():
    weights = [operands((64, 128), seed)[1] for seed in range(5)]
    x_ND, together, alone = torch.randn(5, 128).bfloat16(), torch.empty(5, 64).bfloat16(), torch.empty(5, 64).bfloat16()
    matvecs = Matvecs("fast")
    assert matvecs.multiply_each(x_ND, weights, list(together))
    for n, weight in enumerate(weights):
        assert matvecs.multiply(x_ND[n], (weight,), (alone[n],))
    assert torch.equal(together, alone)


def test_a_kernel_with_other_bits_is_not_used_when_exact():
    class OffByABit(Order):
        def multiply(self, x, matrices, outs, **kwargs):
            super().multiply(x, matrices, outs, **kwargs)
            (out,) = outs
            out[0, 0] = torch.nextafter(out[0, 0], torch.tensor(torch.inf, dtype=torch.bfloat16))

    x, weight, out = operands((64, 128))
    exact, fast = Matvecs("exact"), Matvecs("fast")
    best = orders()[0]
    exact._orders = fast._orders = (OffByABit(best.name, best.number, best.alignment),)
    assert not exact.multiply(x, (weight,), (out,))
    assert fast.multiply(x, (weight,), (out,))


def test_what_does_not_fit_is_left_to_torch():
    matvecs = Matvecs("fast")
    x, weight, out = operands((64, 128))
    assert not matvecs.multiply(x.float(), (weight.float(),), (out.float(),))
    assert not matvecs.multiply(x[:, :64], (weight[:, :64],), (out,))
    assert not matvecs.multiply(x.expand(2, -1), (weight,), (out.expand(2, -1),))
    assert not matvecs.multiply(torch.randn(17, 128).bfloat16(), (weight,), (torch.empty(17, 64).bfloat16(),))


def test_two_threads_give_the_bits_of_one():
    x, weight, out = operands((2688, 2048))
    matvecs, found = Matvecs("fast"), []
    threads = torch.get_num_threads()
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        matvecs.multiply(x, (weight,), (out,))
        found.append(out.clone())
    torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_one_row_times_matrices_of_different_heights():
    x, _, _ = operands((1, 128))
    weights = [operands((rows, 128), rows)[1] for rows in (5, 64, 33, 1)]
    together = [torch.empty(1, len(weight), dtype=torch.bfloat16) for weight in weights]
    matvecs = Matvecs("fast")
    matvecs._orders = orders()[-1:]
    assert matvecs.multiply(x, weights, together)
    for weight, out in zip(weights, together, strict=True):
        alone = torch.empty_like(out)
        assert matvecs.multiply(x, (weight,), (alone,))
        assert torch.equal(out, alone)


def test_without_a_compiler_exact_is_torch_and_fast_is_refused(monkeypatch):
    def none():
        raise OSError("no C compiler (cc) was found for a small C file")

    monkeypatch.setattr("offload.compute.matvec.orders", none)
    x, weight, out = operands((64, 128))
    assert not Matvecs("exact").multiply(x, (weight,), (out,))
    with pytest.raises(ValueError, match="no C compiler"):
        Matvecs("fast")
    with pytest.raises(ValueError, match="one of exact, fixed, fast"):
        Matvecs("quick")


@pytest.mark.parametrize("rows", [1, 4, 40])
def test_fixed_products_take_any_number_of_rows(rows):
    matvecs = Matvecs("fixed")
    x, weight, out = operands((576, 320), rows=rows)
    assert matvecs.multiply(x, (weight,), (out,))
    one = torch.empty(1, 576, dtype=torch.bfloat16)
    assert matvecs.multiply(x[-1], (weight,), (one,))
    assert torch.equal(out[-1], one[0])
    assert matvecs.names == {"576x320": orders()[0].name}
