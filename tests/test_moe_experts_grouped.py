"""The path of a CPU: products by group, layouts, empty slots, torch.compile."""

import copy

import pytest
import torch
from torch import nn
from transformers.integrations.moe import grouped_mm_experts_forward

from moe import Experts, grouped_experts
from moe.experts import blockwise
from moe.experts.blockwise import blocks_of, blockwise_experts
from moe.experts.looped_product import looped_product
from moe.experts.reference import swiglu_experts_reference

PATHS = ["grouped", "blockwise", "looped"]


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


@pytest.mark.parametrize("forced", [[], ["BLOCKWISE_ROWS"], ["LOOPED_EXPERTS", "LOOPED_BYTES"]], ids=PATHS)
@pytest.mark.parametrize("num_tokens", [1, 3, 40])
def test_equals_grouped_mm_of_transformers_with_every_gradient(tiny_config, tolerance, monkeypatch, num_tokens, forced):
    for limit in forced:
        monkeypatch.setattr(f"moe.experts.grouped.{limit}", 0)
    experts = build(tiny_config)
    expert_TK = torch.stack([torch.randperm(7)[:2] for _ in range(num_tokens)])
    weight_TK = torch.rand(num_tokens, 2).masked_fill(expert_TK == 6, 0.0).requires_grad_()
    x_TD = torch.randn(num_tokens, 32, requires_grad=True)
    leaves = (x_TD, weight_TK, *experts.parameters())
    both = [compute(experts, x_TD, expert_TK, weight_TK) for compute in (grouped_experts, grouped_mm_experts_forward)]
    torch.testing.assert_close(*both, **tolerance[torch.float32])
    for found, wanted in zip(*(torch.autograd.grad(y_TD.square().sum(), leaves) for y_TD in both), strict=True):
        torch.testing.assert_close(found, wanted, **tolerance[torch.float32])


def test_negative_ids_are_refused(tiny_config):
    expert_TK = torch.tensor([[3, 1], [-1, 2]])
    with pytest.raises(ValueError, match=r"must not be negative; got -1; pass 6 for an empty slot"):
        grouped_experts(build(tiny_config), torch.randn(2, 32), expert_TK, torch.rand(2, 2))


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, pytest.param(torch.float64, marks=pytest.mark.slow)], ids=str
)
def test_compiles_whole_in_every_number_format(tiny_config, tolerance, monkeypatch, dtype):
    monkeypatch.setattr("moe.experts.grouped.BLOCKWISE_ROWS", 0)
    experts = build(tiny_config, dtype)
    expert_TK, weight_TK = torch.randint(7, (20, 2)), torch.rand(20, 2)
    x_TD = torch.randn(20, 32, dtype=dtype, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(grouped_experts, fullgraph=True, backend="aot_eager")
    exact = copy.deepcopy(experts).double()
    y_TD = grouped_experts(exact, x_TD.double(), expert_TK, weight_TK.double())
    truths = y_TD, *torch.autograd.grad(y_TD.sum(), x_TD)
    for compute in (compiled, grouped_experts):
        y_TD = compute(experts, x_TD, expert_TK, weight_TK)
        for found, truth in zip((y_TD, *torch.autograd.grad(y_TD.sum(), x_TD)), truths, strict=True):
            assert relative_error(found, truth) < tolerance[dtype]["rtol"]


def relative_error(found, truth):
    return ((found.double() - truth.double()).norm() / truth.double().norm()).item()


@pytest.mark.parametrize(
    ("ends", "most_rows", "together", "sizes"),
    [
        ([3, 3, 8], 4, 1, [(0, 3, 3), (2, 2, 2), (2, 3, 3)]),
        ([70, 70, 71], 128, 64, [(0, 70, 128), (2, 1, 64)]),
        ([200], 128, 64, [(0, 128, 128), (0, 72, 128)]),
        ([0, 0], 128, 64, []),
    ],
)
def test_blocks_by_hand(ends, most_rows, together, sizes):
    blocks = blocks_of(ends, most_rows, together)
    assert [(block.expert, block.num_rows, block.num_places) for block in blocks] == sizes
    stops = [0, *(block.places.stop for block in blocks)]
    assert [block.places.start for block in blocks] == stops[:-1]


@pytest.mark.parametrize("is_transposed", [False, True])
def test_blockwise_experts_pass_gradcheck(is_transposed):
    E, K, T, D, F = 4, 2, 7, 3, 2
    expert_N, order_N = torch.randint(E + 1, (T * K,)).masked_fill(torch.arange(T * K) % 3 == 0, 1).sort(stable=True)
    ends = torch.bincount(expert_N, minlength=E)[:E].cumsum(0).tolist()
    leaves = [torch.randn(size, dtype=torch.float64) for size in ((T, D), (T, K), (E, D, 2 * F), (E, F, D))]
    if not is_transposed:
        leaves[2:] = [leaf.transpose(1, 2).contiguous().transpose(1, 2) for leaf in leaves[2:]]
    leaves = tuple(leaf.requires_grad_() for leaf in leaves)

    def run(*tensors):
        return blockwise_experts(*tensors, order_N, ends, torch.float64)

    assert torch.autograd.gradcheck(run, leaves)
    for leaf, gradient in zip(leaves, torch.autograd.grad(run(*leaves).sum(), leaves), strict=True):
        assert gradient.stride() == leaf.stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("is_autocast", [False, True], ids=["stored", "autocast"])
def test_several_blocks_of_an_expert_equal_the_loop_with_every_gradient(
    tiny_config, tolerance, monkeypatch, dtype, is_autocast
):
    monkeypatch.setattr(blockwise, "BLOCK_NUMBERS", 0)
    monkeypatch.setattr(blockwise, "LEAST_ROWS", 64)
    monkeypatch.setattr("moe.experts.grouped.BLOCKWISE_ROWS", 0)
    experts = build(tiny_config, torch.float32 if is_autocast else dtype)
    expert_TK = torch.stack([torch.randperm(7)[:2] for _ in range(300)])
    expert_TK[:, 0] = torch.where(expert_TK[:, 1] == 2, expert_TK[:, 0], 2)
    weight_TK = torch.rand(300, 2).requires_grad_()
    x_TD = torch.randn(300, 32).to(experts.down_proj.dtype).requires_grad_()
    leaves = (x_TD, weight_TK, *experts.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_autocast and dtype == torch.bfloat16):
        y_TD = grouped_experts(experts, x_TD, expert_TK, weight_TK)
    cotangent_TD = torch.randn_like(y_TD)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    truth_TD = swiglu_experts_reference(exact[0], expert_TK, exact[1], *exact[2:])
    bound = tolerance[dtype]["rtol"]
    assert relative_error(y_TD, truth_TD) < bound
    found = torch.autograd.grad(y_TD, leaves, cotangent_TD)
    for gradient, truth in zip(found, torch.autograd.grad(truth_TD, exact, cotangent_TD.double()), strict=True):
        assert relative_error(gradient, truth) < bound


def test_frozen_experts_give_a_gradient_of_tokens_and_weights_alone(tiny_config, monkeypatch):
    monkeypatch.setattr("moe.experts.grouped.BLOCKWISE_ROWS", 0)
    experts = build(tiny_config).requires_grad_(False)
    x_TD, weight_TK = torch.randn(40, 32, requires_grad=True), torch.rand(40, 2, requires_grad=True)
    y_TD = grouped_experts(experts, x_TD, torch.randint(6, (40, 2)), weight_TK)
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(y_TD.sum(), (x_TD, weight_TK)))


def test_weights_of_empty_slots_have_no_influence_and_no_gradient(tiny_config):
    experts = build(tiny_config)
    expert_TK = torch.tensor([[0, 6], [7, 2]])
    weight_TK = torch.rand(2, 2, requires_grad=True)
    y_TD = grouped_experts(experts, torch.randn(2, 32), expert_TK, weight_TK)
    (grad_TK,) = torch.autograd.grad(y_TD.sum(), weight_TK)
    assert (grad_TK[expert_TK >= 6] == 0).all()
    assert (grad_TK[expert_TK < 6] != 0).all()
