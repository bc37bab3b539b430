"""Gradients through frozen quantised experts: the dequantised weights in float64 are the truth."""

import pytest
import torch

pytest.importorskip("triton")

from moe.kernels import ExpertWeights, QuantisedWeight, compute_experts, dequantise, quantise
from moe.kernels.weights.activation import Activation
from moe.kernels.weights.quantise import FORMATS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.gpu
GPT_OSS = Activation(alpha=1.702, limit=0.5, shift=1.0)


def layer(T, D, F, E, K, dtype, *, has_bias=False):
    """Leaves that can be trained, ids with an empty slot, and dense weights that are to be quantised."""
    sizes = {"x": (T, D), "combine": (T, K)} | ({"up_bias": (E, 2 * F), "down_bias": (E, D)} if has_bias else {})
    leaves = {
        name: torch.randn(size, device=DEVICE, dtype=dtype).mul(0.5).requires_grad_() for name, size in sizes.items()
    }
    expert_TK = torch.randint(E, (T, K), device=DEVICE)
    expert_TK[0, 0] = E
    dense = [torch.randn(size, device=DEVICE) * 0.5 for size in ((E, 2 * F, D), (E, D, F))]
    return leaves, expert_TK, dense


def experts_of(leaves, projections, **layout):
    return ExpertWeights(*projections, leaves.get("up_bias"), leaves.get("down_bias"), **layout)


def truth(leaves, expert_TK, projections, cotangent_TD, **layout):
    """Output and gradients of a loop over routed rows in float64."""
    exact = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
    up, down = (dequantise(weight, torch.float64) for weight in projections)
    is_halves = layout.get("is_halves", True)
    rows = []
    for x_D, ids, factors in zip(exact["x"], expert_TK.tolist(), exact["combine"], strict=True):
        y_D = 0 * x_D
        for expert, factor in zip(ids, factors, strict=True):
            if expert >= len(up):
                continue
            hidden = up[expert] @ x_D + (exact["up_bias"][expert] if "up_bias" in exact else 0)
            halves = hidden.chunk(2) if is_halves else (hidden[::2], hidden[1::2])
            y = down[expert] @ layout.get("activation", Activation()).reference(*halves)
            y_D = y_D + factor * (y + (exact["down_bias"][expert] if "down_bias" in exact else 0))
        rows.append(y_D)
    y_TD = torch.stack(rows)
    return [y_TD, *torch.autograd.grad(y_TD, list(exact.values()), cotangent_TD.double())]


def relative_error(found, wanted):
    return ((found.double() - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, torch.float32) for name in FORMATS), ("int4", torch.bfloat16)], ids=str
)
def test_gradients_of_everything_but_the_quantised_weights(guarded_memory, tolerance, name, dtype):
    # more than 128 inputs, so that a block of fp8_block ends within them
    leaves, expert_TK, dense = layer(4, 144, 32, 2, 2, dtype, has_bias=True)
    projections = [quantise(weight, name, group=16) for weight in dense]
    y_TD = compute_experts(leaves["x"], expert_TK, leaves["combine"], experts_of(leaves, projections))
    cotangent_TD = torch.randn_like(y_TD)
    found = [y_TD, *torch.autograd.grad(y_TD, list(leaves.values()), cotangent_TD)]
    exact = truth(leaves, expert_TK, projections, cotangent_TD)
    for what, value, wanted in zip(("y", *leaves), found, exact, strict=True):
        assert relative_error(value, wanted) < tolerance[dtype]["rtol"], what


def test_gradients_with_pairs_side_by_side_and_experts_in_cache_slots(guarded_memory, tolerance):
    leaves, expert_TK, dense = layer(5, 48, 32, 3, 2, torch.float32)
    expert_TK[1, 0] = 1
    projections = [quantise(weight, "int4", group=16) for weight in dense]
    layout = {"activation": GPT_OSS, "is_halves": False}
    slot_E = torch.tensor([1, -1, 0], dtype=torch.int32, device=DEVICE)
    cached = experts_of(leaves, [_slots(weight, [2, 0]) for weight in projections], slot_E=slot_E, **layout)
    y_TD = compute_experts(leaves["x"], expert_TK, leaves["combine"], cached)
    found = [y_TD, *torch.autograd.grad(y_TD, list(leaves.values()), torch.ones_like(y_TD))]
    present_TK = torch.where(expert_TK == 1, 3, expert_TK)
    exact = truth(leaves, present_TK, projections, torch.ones_like(y_TD), **layout)
    for what, value, wanted in zip(("y", *leaves), found, exact, strict=True):
        assert relative_error(value, wanted) < tolerance[torch.float32]["rtol"], what


def _slots(weight, experts):
    zero = None if weight.zero is None else weight.zero[experts]
    groups = (weight.out_group, weight.in_group, weight.num_inputs)
    return QuantisedWeight(weight.format, weight.data[experts], weight.scale[experts], zero, *groups)


@pytest.mark.skipif(DEVICE == "cuda", reason="float64 products are proven in the interpreter")
@pytest.mark.parametrize("name", [pytest.param("int8", marks=pytest.mark.slow), "int4"])
def test_gradcheck_through_frozen_quantised_experts(name):
    leaves, expert_TK, dense = layer(3, 32, 16, 3, 2, torch.float64, has_bias=True)
    projections = [quantise(weight, name, group=16) for weight in dense]

    def run(x, combine, up_bias, down_bias):
        return compute_experts(x, expert_TK, combine, ExpertWeights(*projections, up_bias, down_bias))

    # fast mode compares random projections of the Jacobian; the full one costs a launch per input number
    assert torch.autograd.gradcheck(run, tuple(leaves.values()), fast_mode=True)


@pytest.mark.parametrize("part", ["scale", "zero"])
def test_a_gradient_of_quantised_weights_is_refused(part):
    leaves, expert_TK, dense = layer(2, 32, 16, 2, 1, torch.float32)
    up, down = (quantise(weight, "int4", group=16) for weight in dense)
    getattr(up, part).requires_grad_()
    with pytest.raises(ValueError, match=r"quantised weights cannot be trained.*detach them"):
        compute_experts(leaves["x"], expert_TK, leaves["combine"], ExpertWeights(up, down))
    with torch.no_grad():
        assert compute_experts(leaves["x"], expert_TK, leaves["combine"], ExpertWeights(up, down)).isfinite().all()
