"""Products by oneDNN against torch's, layouts and gradients included, and when which library is asked."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import moe.parts.cpu_training
import moe.parts.linear
from moe.parts.linear import Linear, matmul, mkl_is_half_as_wide

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")


@pytest.fixture
def onednn(monkeypatch):
    monkeypatch.setattr(moe.parts.linear, "mkl_is_half_as_wide", lambda: True)
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
        patch.setattr(moe.parts.linear, "mkl_is_half_as_wide", lambda: True)
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


@pytest.mark.parametrize(
    ("vendor", "capability", "expected"),
    [
        ("AuthenticAMD", "AVX512", True),
        ("GenuineIntel", "AVX512", False),
        ("AuthenticAMD", "AVX2", False),
        ("", "AVX512", False),
    ],
)
def test_who_is_asked_follows_from_the_processor(vendor, capability, expected, monkeypatch):
    monkeypatch.setattr(moe.parts.linear, "processor_fact", lambda _name: vendor)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert mkl_is_half_as_wide.__wrapped__() is expected
