"""Products by oneDNN against torch's, layouts and gradients included, and when which library is asked."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import moe.parts.cpu_training
import moe.parts.linear
from moe.parts.linear import Linear, builds_primitives, matmul

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")


def _onednn_for_float32(dtype):
    return "onednn" if dtype == torch.float32 else "torch"


@pytest.fixture
def onednn(monkeypatch):
    monkeypatch.setattr(moe.parts.linear, "library_of", _onednn_for_float32)
    monkeypatch.setattr(moe.parts.cpu_training, "FEWEST_NUMBERS", 1)


@needs_onednn
@settings(max_examples=60, deadline=None)
@given(
    N=st.integers(1, 70),
    I=st.integers(1, 70),
    O=st.integers(1, 70),
    layouts=st.tuples(st.booleans(), st.booleans(), st.sampled_from(["new", "rows", "columns"])),
)
def test_any_layout_is_torchs_product(N, I, O, layouts):
    turns_left, turns_right, out_layout = layouts
    left = torch.randn(I, N).T if turns_left else torch.randn(N, I)
    right = torch.randn(O, I).T if turns_right else torch.randn(I, O)
    out = {"new": None, "rows": torch.empty(N, O), "columns": torch.empty(O, N).T}[out_layout]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moe.parts.linear, "library_of", _onednn_for_float32)
        found = matmul(left, right, out=out)
    assert out is None or found is out
    torch.testing.assert_close(found, left @ right, rtol=1e-5, atol=1e-5)


@needs_onednn
def test_a_linear_layer_learns_like_torchs(onednn):
    ours, theirs = Linear(48, 40), nn.Linear(48, 40, bias=False)
    theirs.load_state_dict(ours.state_dict())
    x_BSI = torch.randn(3, 50, 48, requires_grad=True)
    price = torch.randn(3, 50, 40)
    found, wanted = (
        torch.autograd.grad((layer(x_BSI) * price).sum(), [x_BSI, layer.weight]) for layer in (ours, theirs)
    )
    torch.testing.assert_close(ours(x_BSI), theirs(x_BSI), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-4)


def test_frozen_weights_and_inputs_get_no_gradient(onednn):
    layer = Linear(16, 8)
    layer.weight.requires_grad_(False)
    x_NI = torch.randn(32, 16, requires_grad=True)
    layer(x_NI).sum().backward()
    assert layer.weight.grad is None
    torch.testing.assert_close(x_NI.grad, layer.weight.sum(dim=0).expand(32, 16), rtol=1e-5, atol=1e-5)
    layer.weight.requires_grad_(True)
    layer(x_NI.detach()).sum().backward()
    torch.testing.assert_close(layer.weight.grad, x_NI.detach().sum(dim=0).expand(8, 16), rtol=1e-5, atol=1e-5)


def test_other_dtypes_autocast_and_inference_have_torchs_bits(onednn):
    layer, x_NI = Linear(48, 40), torch.randn(64, 48)
    with torch.no_grad():
        assert torch.equal(layer(x_NI), nn.functional.linear(x_NI, layer.weight))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x_NI).dtype == torch.bfloat16
    wide = layer.double()
    assert torch.equal(wide(x_NI.double()), nn.functional.linear(x_NI.double(), wide.weight))
    assert torch.equal(matmul(x_NI.double(), wide.weight.T), x_NI.double() @ wide.weight.T)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_widened_product_is_rounded_once(monkeypatch, dtype):
    """On processors without bfloat16 products the factors are widened; float32 itself has nothing to widen to."""
    monkeypatch.setattr(moe.parts.linear, "library_of", lambda _: "float32")
    left, right = torch.randn(33, 65).to(dtype), torch.randn(65, 17).to(dtype)
    assert torch.equal(matmul(left, right), (left.float() @ right.float()).to(dtype))
    out = torch.empty(17, 33, dtype=dtype).T
    assert matmul(left, right, out=out) is out
    assert torch.equal(out, (left.float() @ right.float()).to(dtype))


@pytest.mark.parametrize("library", ["torch", "float32"])
def test_experts_in_bfloat16_learn_by_either_library(monkeypatch, tolerance, library):
    from moe.experts.blockwise import blockwise_experts

    monkeypatch.setattr(moe.parts.linear, "library_of", lambda _: library)
    T, D, F, E = 40, 16, 24, 3
    leaves = [torch.randn(size).mul(0.3).requires_grad_() for size in ((T, D), (T, 1), (E, D, 2 * F), (E, F, D))]
    order_N = torch.arange(T)
    ends, price = [15, 15, T], torch.randn(T, D)
    found = blockwise_experts(*leaves, order_N, ends, torch.bfloat16)
    x_TD, combine_T1, up_EDO, down_EFD = leaves
    rows = []
    for expert, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        gate, up = (x_TD[start:end] @ up_EDO[expert]).chunk(2, dim=1)
        rows.append((nn.functional.silu(gate) * up) @ down_EFD[expert] * combine_T1[start:end])
    wanted = torch.cat(rows)
    torch.testing.assert_close(found, wanted, **tolerance[torch.bfloat16])
    for got, right in zip(*(torch.autograd.grad((y * price).sum(), leaves) for y in (found, wanted)), strict=True):
        torch.testing.assert_close(got, right, atol=5e-2, rtol=5e-2)


def test_who_builds_primitives(monkeypatch):
    x, half = torch.ones(1), torch.ones(1, dtype=torch.bfloat16)
    for library, expected in (("torch", (False, True)), ("float32", (False, False)), ("onednn", (True, True))):
        monkeypatch.setattr(moe.parts.linear, "library_of", lambda _, library=library: library)
        assert (builds_primitives(x), builds_primitives(half)) == expected
