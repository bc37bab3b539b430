"""Single-token products: close to float64 whatever the shape, and the bits of torch where they claim to have them."""

import pytest
import torch
from torch import nn

from offload.compute.matvec import AMX_BLOCK, Matvecs, _kernels

SHAPES = [(1, 1), (3, 31), (5, 33), (64, 128), (17, 300), (96, 2048), (2688, 2048), (2048, 1344)]


def operands(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator).bfloat16()
    x = torch.randn(1, shape[1], generator=generator).bfloat16()
    return x, weight, torch.empty(1, shape[0], dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("dot", shape) for shape in SHAPES]
    + [("amx", shape) for shape in SHAPES if shape[0] % AMX_BLOCK == shape[1] % AMX_BLOCK == 0],
)
def test_kernels_against_float64(name, shape):
    if name not in _kernels():
        pytest.skip("this processor has no AMX")
    x, weight, out = operands(shape)
    _kernels()[name](x, (weight,), (out,))
    expected = x.double() @ weight.double().t()
    error = (out.double() - expected).abs()
    assert (error <= 2**-8 * expected.abs() + 1e-5 * shape[1]).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_exact_products_have_the_bits_of_torch(shape):
    matvecs = Matvecs("exact")
    for seed in range(20):
        x, weight, out = operands(shape, seed)
        if matvecs.multiply(x, (weight,), (out,)):
            assert torch.equal(out, x @ weight.t())
            assert torch.equal(out, nn.functional.linear(x, weight))


def test_several_products_at_once_are_those_one_by_one():
    weights = [operands((64, 128), seed)[1] for seed in range(5)]
    x_ND, together, alone = torch.randn(5, 128).bfloat16(), torch.empty(5, 64).bfloat16(), torch.empty(5, 64).bfloat16()
    matvecs = Matvecs("fast")
    assert matvecs.multiply(x_ND, weights, list(together))
    for n, weight in enumerate(weights):
        assert matvecs.multiply(x_ND[n], (weight,), (alone[n],))
    assert torch.equal(together, alone)


def test_a_kernel_with_other_bits_is_not_used_when_exact():
    def off_by_a_bit(x, weights, outs):
        (out,) = outs
        torch.mm(x, weights[0].t(), out=out)
        out[0, 0] = torch.nextafter(out[0, 0], torch.tensor(torch.inf, dtype=torch.bfloat16))

    x, weight, out = operands((64, 128))
    exact, fast = Matvecs("exact"), Matvecs("fast")
    exact._kernels = fast._kernels = {"wrong": off_by_a_bit}
    assert not exact.multiply(x, (weight,), (out,))
    assert fast.multiply(x, (weight,), (out,))


def test_what_does_not_fit_is_left_to_torch():
    matvecs = Matvecs("fast")
    x, weight, out = operands((64, 128))
    assert not matvecs.multiply(x.float(), (weight.float(),), (out.float(),))
    assert not matvecs.multiply(x[:, :64], (weight[:, :64],), (out,))
    assert not matvecs.multiply(x.expand(2, -1), (weight,), (out.expand(2, -1),))


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
    matvecs._kernels = {"dot": _kernels()["dot"]}
    assert matvecs.multiply(x, weights, together)
    for weight, out in zip(weights, together, strict=True):
        alone = torch.empty_like(out)
        assert matvecs.multiply(x, (weight,), (alone,))
        assert torch.equal(out, alone)


def test_without_a_compiler_exact_is_torch_and_fast_is_refused(monkeypatch):
    def none():
        raise OSError("no C compiler (cc) was found for a small C file")

    monkeypatch.setattr("offload.compute.matvec._kernels", none)
    x, weight, out = operands((64, 128))
    assert not Matvecs("exact").multiply(x, (weight,), (out,))
    with pytest.raises(ValueError, match="no C compiler"):
        Matvecs("fast")
    with pytest.raises(ValueError, match="one of exact, fast"):
        Matvecs("quick")
