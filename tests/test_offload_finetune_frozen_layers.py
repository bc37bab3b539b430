"""Adapted linear layers and norms by our C: bits, gradients against float64, and what autograd keeps of them."""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRMSNorm

from offload.finetune.passing.frozen_layers import AdaptedLinear, FrozenNorm, quicken_frozen_layers
from offload.finetune.passing.low_rank import summing_order

WIDTH, OUT = 128, 96
pytestmark = pytest.mark.skipif(summing_order() is None, reason="neither AMX nor AVX512_BF16, or no C compiler")


class Part(nn.Module):
    """A norm before two adapted linear layers, which share its output."""

    def __init__(self):
        super().__init__()
        self.norm = Qwen3MoeRMSNorm(WIDTH)
        self.first, self.second = nn.Linear(WIDTH, OUT, bias=True), nn.Linear(WIDTH, OUT, bias=False)

    def forward(self, x):
        normed = self.norm(x)
        return self.first(normed) * self.second(normed)


def adapted(dtype):
    """The part with adapters that are not zero; those of bfloat16 layers are float32, as PEFT has them."""
    torch.manual_seed(0)
    part = Part()
    part.norm.weight.data.normal_(1.0, 0.2)
    part = part.bfloat16().requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=3, lora_alpha=6, target_modules=["first", "second"]), part)
    for name, value in part.named_parameters():
        if "lora" in name:
            value.data = torch.randn(value.shape) / 8
    return part if dtype == torch.bfloat16 else part.to(dtype)


def gradients(part, x, grad):
    kept = []
    given = x.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        out = part(given)
    out.backward(grad)
    own = {tensor.data_ptr() for tensor in part.parameters()}
    nbytes = sum({tensor.data_ptr(): tensor.nbytes for tensor in kept if tensor.data_ptr() not in own}.values())
    return [out.detach(), given.grad, *(value.grad for value in part.parameters() if value.requires_grad)], nbytes


def error(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("rows", [1, 33])
def test_outputs_and_gradients_are_as_near_to_float64_as_those_of_torch(rows):
    x, grad = (torch.randn(2, rows, width).bfloat16() for width in (WIDTH, OUT))
    part = adapted(torch.bfloat16)
    torchs, more = gradients(part, x, grad)
    expected, _ = gradients(adapted(torch.float64), x.double(), grad.double())
    part.zero_grad()
    quicken_frozen_layers(part)
    assert isinstance(part.norm.forward.__self__, FrozenNorm)
    assert all(isinstance(layer.forward.__self__, AdaptedLinear) for layer in (part.first, part.second))
    found, fewer = gradients(part, x, grad)
    for ours, theirs, exact in zip(found, torchs, expected, strict=True):
        assert error(ours, exact) < max(1.5 * error(theirs, exact), 0.004)
    # the norm's input, its output, which both layers share, and what the product keeps of both layers
    assert fewer == 2 * x.nbytes + 2 * grad.nbytes
    assert more > 2 * fewer


def test_a_norm_keeps_its_bits_and_other_calls_go_to_torch():
    part = adapted(torch.bfloat16)
    x = torch.randn(5, WIDTH).bfloat16()
    turned = x.t().contiguous().t()
    expected = part.norm(x), part.norm(x.float()), part.norm(turned), part.first(turned)
    quicken_frozen_layers(part)
    found = part.norm(x), part.norm(x.float()), part.norm(turned), part.first(turned)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_layers_that_are_not_plain_stay_as_they_are():
    part = adapted(torch.float32)
    quicken_frozen_layers(part)
    assert not any("forward" in vars(module) for module in part.modules())
    part = adapted(torch.bfloat16)
    part.first.lora_dropout["default"] = nn.Dropout(0.5)
    part.norm.weight.requires_grad_()
    quicken_frozen_layers(part)
    assert ["forward" in vars(layer) for layer in (part.norm, part.first, part.second)] == [False, False, True]
