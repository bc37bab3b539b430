"""The path for few tokens, and quantised weights on both paths, against a loop in float64."""

import pytest
import torch

pytest.importorskip("triton")

from moe.kernels import ExpertWeights, compute_experts, dequantise, quantise
from moe.kernels.decode import rows as decode_module
from moe.kernels.grouped.forward import forward
from moe.kernels.launching.launch import execute
from moe.kernels.launching.tuned import chosen_tiles
from moe.kernels.weights.activation import Activation

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.gpu
GPT_OSS = Activation(alpha=1.702, limit=0.5, shift=1.0)
FORMATS = ("int8", "int4", "fp8", "fp8_block")


def reference(x_TD, expert_TK, combine_TK, weights, up, down, up_bias=None, down_bias=None):
    """In float64, all experts for all tokens, then the chosen ones; weights [E, O, D] and [E, D, F]."""
    hidden_TEO = torch.einsum("td,eod->teo", x_TD.double(), up.double())
    hidden_TEO = hidden_TEO if up_bias is None else hidden_TEO + up_bias.double()
    gate, extra = hidden_TEO, None
    if weights.activation.gated:
        halves = hidden_TEO.chunk(2, -1) if weights.is_halves else (hidden_TEO[..., ::2], hidden_TEO[..., 1::2])
        gate, extra = halves
    y_TED = torch.einsum("tef,edf->ted", weights.activation.reference(gate, extra), down.double())
    y_TED = y_TED if down_bias is None else y_TED + down_bias.double()
    E = len(up)
    is_ours_TK = (expert_TK >= 0) & (expert_TK < E)
    chosen_TKD = y_TED.gather(1, expert_TK.clamp(0, E - 1)[..., None].expand(-1, -1, y_TED.shape[2]))
    return (chosen_TKD * (combine_TK.double() * is_ours_TK)[..., None]).sum(1)


def tensors(T, D, F, E, K, dtype=torch.float32):
    sizes = [(T, D), (E, 2 * F, D), (E, D, F), (E, 2 * F), (E, D)]
    x, up, down, up_bias, down_bias = (torch.randn(size, dtype=dtype, device=DEVICE) * 0.5 for size in sizes)
    return x, torch.randint(E, (T, K), device=DEVICE), torch.rand(T, K, device=DEVICE), up, down, up_bias, down_bias


def relative_error(found, truth):
    return ((found.double() - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize(("T", "E", "K"), [(1, 6, 3), (7, 4, 2), (19, 40, 2), (40, 2, 1)])
def test_few_tokens(guarded_memory, tolerance, T, E, K):
    x, expert, combine, up, down, up_bias, down_bias = tensors(T, 40, 24, E, K)
    expert[0, 0] = E
    weights = ExpertWeights(up, down, up_bias, down_bias, GPT_OSS, is_halves=False)
    truth = reference(x, expert, combine, weights, up, down, up_bias, down_bias)
    assert relative_error(compute_experts(x, expert, combine, weights), truth) < tolerance[x.dtype]["rtol"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_halves_of_other_number_formats(tolerance, dtype):
    x, expert, combine, up, down, *_ = tensors(3, 24, 20, 4, 2, dtype)
    weights = ExpertWeights(up, down)
    truth = reference(x, expert, combine, weights, up, down)
    assert relative_error(compute_experts(x, expert, combine, weights), truth) < tolerance[dtype]["rtol"]


@pytest.mark.parametrize("is_gated", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["gated", "plain"])
def test_sums_split_over_inputs(guarded_memory, monkeypatch, tolerance, is_gated):
    monkeypatch.setattr(decode_module, "num_processors", lambda device: 1000)
    x, expert, combine, up, down, up_bias, down_bias = tensors(2, 400, 280, 3, 2)
    activation = Activation() if is_gated else Activation("relu", gated=False)
    if not is_gated:
        up, up_bias = up[:, :280].contiguous(), up_bias[:, :280].contiguous()
    weights = ExpertWeights(up, down, up_bias, down_bias, activation)
    truth = reference(x, expert, combine, weights, up, down, up_bias, down_bias)
    assert relative_error(compute_experts(x, expert, combine, weights), truth) < tolerance[x.dtype]["rtol"]


@pytest.mark.parametrize("T", [3, 300], ids=["few", "many"])
def test_experts_in_cache_slots(tolerance, T):
    x, expert, combine, up, down, *_ = tensors(T, 16, 16, 6, 2)
    slots = [3, 0, -1, 1, -1, 2]
    cached_up, cached_down = (torch.stack([w[slots.index(slot)] for slot in range(4)]) for w in (up, down))
    weights = ExpertWeights(cached_up, cached_down, slot_E=torch.tensor(slots, dtype=torch.int32, device=DEVICE))
    present = torch.where((expert == 2) | (expert == 4), 6, expert)
    truth = reference(x, present, combine, weights, up, down)
    assert relative_error(compute_experts(x, expert, combine, weights), truth) < tolerance[x.dtype]["rtol"]


def test_input_gradient_through_frozen_experts_in_cache_slots(tolerance):
    x, expert, combine, up, down, *_ = tensors(4, 16, 16, 3, 2)
    slots = torch.tensor([2, 0, 1], dtype=torch.int32, device=DEVICE)
    x.requires_grad_()
    cached = ExpertWeights(up[[1, 2, 0]], down[[1, 2, 0]], slot_E=slots)
    (found,) = torch.autograd.grad(compute_experts(x, expert, combine, cached).square().sum(), x)
    (truth,) = torch.autograd.grad(reference(x, expert, combine, cached, up, down).square().sum(), x)
    assert relative_error(found, truth) < tolerance[x.dtype]["rtol"]
    with pytest.raises(ValueError, match="cannot be trained"):
        compute_experts(x, expert, combine, ExpertWeights(up.requires_grad_(), down, slot_E=slots))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("path", ["few", "many"])
def test_quantised_weights_equal_their_dequantised_selves(guarded_memory, tolerance, name, path):
    x, expert, combine, up, down, up_bias, down_bias = tensors(4, 160, 64, 3, 2)
    quantised = [quantise(weight, name, group=32) for weight in (up, down)]
    weights = ExpertWeights(*quantised, up_bias, down_bias)
    truth = reference(x, expert, combine, weights, *map(dequantise, quantised), up_bias, down_bias)
    if path == "few":
        found = compute_experts(x, expert, combine, weights)
    else:
        tiles = chosen_tiles(x.device, x.dtype, expert.numel(), weights)
        found, *_ = forward(x, expert, combine, weights, tiles, execute, saves=False)
    assert relative_error(found, truth) < tolerance[x.dtype]["rtol"]


@pytest.mark.parametrize(("name", "bound"), [("int8", 0.01), ("int4", 0.12), ("fp8", 0.04), ("fp8_block", 0.04)])
def test_quantising_loses_no_more_than_its_bits(name, bound):
    weight = torch.randn(2, 130, 256)
    assert (dequantise(quantise(weight, name)) - weight).norm() / weight.norm() < bound


def test_quantising_keeps_what_is_exact():
    zeros = torch.zeros(1, 16, 32)
    assert all((dequantise(quantise(zeros, name, group=32)) == 0).all() for name in FORMATS)
    integers = torch.arange(-7, 9).repeat(2).view(1, 1, 32).float()
    assert (dequantise(quantise(integers, "int4", group=32)) == integers).all()


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_bit_patterns_that_stand_for_int4_codes(half):
    """The kernels make numbers of codes by filling the mantissa of 128 (bfloat16) or 1024 (float16)."""
    code = torch.arange(16, dtype=torch.int16)
    pattern, bias = (0x4300, 128) if half == torch.bfloat16 else (0x6400, 1024)
    assert ((code | pattern).view(half).float() - bias == code).all()


def test_bad_weights_are_refused_with_both_shapes():
    with pytest.raises(ValueError, match=r"\[C, D, F\] = \[2, 8, 6\].*got \[2, 6, 8\]"):
        ExpertWeights(torch.zeros(2, 12, 8), torch.zeros(2, 6, 8))
    with pytest.raises(ValueError, match="unknown format 'int3'"):
        quantise(torch.zeros(1, 16, 16), "int3")
    with pytest.raises(ValueError, match="divides 40"):
        quantise(torch.zeros(1, 16, 40), "int4", group=32)
