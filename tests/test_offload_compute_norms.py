"""Norms of single tokens by our C: torch's bits for every width, and only where a module computes what is expected."""

import pytest
import torch
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.mixtral.modeling_mixtral import MixtralRMSNorm

from offload.compute import norms


class RoundsLast(MixtralRMSNorm):
    """The other place of the rounding, which some families have."""

    def forward(self, hidden_states):
        wide = hidden_states.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return (self.weight * (wide * scale)).to(hidden_states.dtype)


class AlmostANorm(MixtralRMSNorm):
    def forward(self, hidden_states):
        return super().forward(hidden_states) * 1.5


@pytest.fixture(autouse=True)
def _needs_c():
    if norms._sum() is None:
        pytest.skip("no C compiler")


def _random(norm):
    norm.weight.data.normal_(generator=torch.Generator().manual_seed(1))
    return norm.bfloat16().requires_grad_(False)


@pytest.mark.parametrize("family", [MixtralRMSNorm, RoundsLast])
@pytest.mark.parametrize("width", [1, 7, 64, 100, 128, 2048, 2880, 7168])
def test_bits_are_those_of_torch(family, width):
    norm = _random(family(width))
    model = nn.ModuleList([norm])
    x = (torch.randn(4, 2, width, generator=torch.Generator().manual_seed(2)) * 3).bfloat16()
    x[0, 0] = 0
    expected = norm(x)
    norms.quicken_norms(model)
    assert ("forward" in vars(norm)) == norms._sums_like_torch(width)
    assert torch.equal(norm(x), expected)
    assert torch.equal(norm(x[:, :1]), expected[:, :1])


@pytest.mark.parametrize("width", [64, 100, 1000, 2048, 2880, 7168, 20000])
def test_sums_are_those_of_torch(width):
    if not norms._sums_like_torch(128):
        pytest.skip("torch sums in another order here")
    assert norms._sums_like_torch(width)


def test_another_order_of_sums_is_noticed(monkeypatch):
    monkeypatch.setattr(norms, "_sums_like_torch", lambda width: False)
    norm = _random(MixtralRMSNorm(64))
    norms.quicken_norms(nn.ModuleList([norm]))
    assert "forward" not in vars(norm)


def test_modules_that_compute_something_else_stay_as_they_are():
    modules = [_random(AlmostANorm(64)), _random(Gemma2RMSNorm(64)), nn.LayerNorm(64).bfloat16(), MixtralRMSNorm(64)]
    norms.quicken_norms(nn.ModuleList(modules))
    assert not any("forward" in vars(module) for module in modules)


def test_training_and_other_dtypes_go_to_the_module_itself():
    norm = _random(MixtralRMSNorm(64))
    norms.quicken_norms(nn.ModuleList([norm]))
    x = torch.randn(2, 64).bfloat16().requires_grad_()
    norm(x).sum().backward()
    assert x.grad is not None
    assert norm(x.detach().float()).dtype == torch.float32
    assert norm(x.detach().t().contiguous().t()).shape == x.shape
