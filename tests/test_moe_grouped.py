"""The path of a CPU: products by group, layouts, empty slots, torch.compile."""

import pytest
import torch
from torch import nn
from transformers.integrations.moe import grouped_mm_experts_forward

from moe import Experts, grouped_experts
from moe.looped_product import looped_product


def test_looped_product_by_hand():
    x_NI = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    right_EIO = torch.tensor([[[1.0], [0.0]], [[9.0], [9.0]], [[0.0], [1.0]]])
    assert looped_product(x_NI, right_EIO, [1, 1, 2]).tolist() == [[1.0], [4.0], [0.0]]


@pytest.mark.parametrize("is_transposed", [False, True])
def test_looped_product_passes_gradcheck_with_idle_groups_and_rows_of_nobody(is_transposed):
    x_NI = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    right_EIO = torch.randn(5, 3, 4, dtype=torch.float64)
    if is_transposed:
        right_EIO = right_EIO.transpose(1, 2).contiguous().transpose(1, 2)
    right_EIO.requires_grad_()
    ends = [0, 2, 2, 5, 5]
    assert torch.autograd.gradcheck(lambda x, right: looped_product(x, right, ends), (x_NI, right_EIO))
    (grad_EIO,) = torch.autograd.grad(looped_product(x_NI, right_EIO, ends).sum(), right_EIO)
    assert grad_EIO.stride() == right_EIO.stride()
    assert (grad_EIO[[0, 2, 4]] == 0).all()


def test_looped_product_as_an_operator_passes_opcheck():
    x_NI, right_EIO = torch.randn(6, 3, requires_grad=True), torch.randn(3, 3, 4, requires_grad=True)
    ends_E = torch.tensor([2, 2, 5], dtype=torch.int32)
    torch.library.opcheck(torch.ops.expertier.looped_product.default, (x_NI, right_EIO, ends_E))


def build(tiny_config, dtype=torch.float32):
    experts = Experts(tiny_config()).to(dtype)
    experts._is_expert_parallel = True
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.3)
    return experts


@pytest.mark.parametrize("num_tokens", [1, 3, 40])
def test_equals_grouped_mm_of_transformers_with_every_gradient(tiny_config, tolerance, num_tokens):
    experts = build(tiny_config)
    expert_TK = torch.stack([torch.randperm(7)[:2] for _ in range(num_tokens)])
    weight_TK = torch.rand(num_tokens, 2).masked_fill(expert_TK == 6, 0.0).requires_grad_()
    x_TD = torch.randn(num_tokens, 32, requires_grad=True)
    leaves = (x_TD, weight_TK, *experts.parameters())
    both = [compute(experts, x_TD, expert_TK, weight_TK) for compute in (grouped_experts, grouped_mm_experts_forward)]
    torch.testing.assert_close(*both, **tolerance[torch.float32])
    for found, wanted in zip(*(torch.autograd.grad(y_TD.square().sum(), leaves) for y_TD in both), strict=True):
        torch.testing.assert_close(found, wanted, **tolerance[torch.float32])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_compiles_whole_in_every_number_format(tiny_config, tolerance, dtype):
    experts = build(tiny_config, dtype)
    expert_TK, weight_TK = torch.randint(7, (20, 2)), torch.rand(20, 2)
    x_TD = torch.randn(20, 32, dtype=dtype, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(grouped_experts, fullgraph=True, backend="aot_eager")
    both = [compute(experts, x_TD, expert_TK, weight_TK) for compute in (compiled, grouped_experts)]
    torch.testing.assert_close(*both, **tolerance[dtype])
    found, wanted = (torch.autograd.grad(y_TD.sum(), x_TD)[0] for y_TD in both)
    torch.testing.assert_close(found, wanted, **tolerance[dtype])


def test_weights_of_empty_slots_have_no_influence_and_no_gradient(tiny_config):
    experts = build(tiny_config)
    expert_TK = torch.tensor([[0, 6], [7, 2]])
    weight_TK = torch.rand(2, 2, requires_grad=True)
    y_TD = grouped_experts(experts, torch.randn(2, 32), expert_TK, weight_TK)
    (grad_TK,) = torch.autograd.grad(y_TD.sum(), weight_TK)
    assert (grad_TK[expert_TK >= 6] == 0).all()
    assert (grad_TK[expert_TK < 6] != 0).all()
