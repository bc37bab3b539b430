"""The kernels as operators of PyTorch: with autograd, and with fake implementations so that `torch.compile` works.

`compute_experts` is what other code calls. Operators take tensors and plain values only; `weights/flat.py` makes those
of `ExpertWeights`.

Shapes: T tokens, K experts per token, N = T * K routed rows, E experts, C slots, O up outputs, D model width,
F expert width.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .decode.rows import MAX_ROWS, decode
from .grouped.backward import Needs, backward
from .grouped.forward import forward
from .grouped.metadata import Groups
from .launching.launch import execute
from .launching.tuned import chosen_tiles
from .weights.flat import FlatWeights, flatten, unflatten
from .weights.quantise import QuantisedWeight
from .weights.weights import ExpertWeights


def compute_experts(x_TD: Tensor, expert_TK: Tensor, combine_TK: Tensor, weights: ExpertWeights) -> Tensor:
    """Weighted sum of each token's experts: few tokens without gradient take the decode path, others the grouped path.

    Args:
        x_TD: tokens, any floating-point dtype.
        expert_TK: int32 or int64 expert ids; ids outside 0..E-1, and experts without a slot, contribute nothing.
        combine_TK: floating-point combine weights; no normalisation is assumed.
        weights: the experts; products are computed in the dtype of dense weights (of autocast, where it is on), or of
            `x_TD` for quantised ones. Quantised weights get no gradient; tokens, combine weights and biases do.

    Returns:
        [T, D] in the dtype of `x_TD`.

    Raises:
        ValueError: if shapes do not fit, or a gradient is asked of quantised weights or of weights in cache slots.
    """
    _check(x_TD, expert_TK, combine_TK, weights)
    if x_TD.shape[0] == 0 or expert_TK.shape[1] == 0:
        return torch.zeros_like(x_TD)
    flat = flatten(weights, _compute_dtype(x_TD, weights))
    x = x_TD.to(_compute_dtype(x_TD, weights))
    leaves = (x, combine_TK, flat.up, flat.down, flat.up_bias, flat.down_bias)
    saves = torch.is_grad_enabled() and any(leaf is not None and leaf.requires_grad for leaf in leaves)
    if saves and weights.slot_E is not None and (flat.up.requires_grad or flat.down.requires_grad):
        raise ValueError("weights in cache slots cannot be trained; pass slot_E=None or weights without requires_grad")
    y_TD, *_ = torch.ops.expertier.experts(x, combine_TK, expert_TK, saves, *flat)
    return y_TD.to(x_TD.dtype)


def _check(x_TD: Tensor, expert_TK: Tensor, combine_TK: Tensor, weights: ExpertWeights) -> None:
    num_tokens = x_TD.shape[0]
    width = weights.up.shape[2]
    if x_TD.dim() != 2 or x_TD.shape[1] != width:
        raise ValueError(f"x must be [T, {width}]; got {list(x_TD.shape)}; flatten leading dimensions")
    if expert_TK.dim() != 2 or expert_TK.shape[0] != num_tokens or combine_TK.shape != expert_TK.shape:
        raise ValueError(
            f"expert ids and combine weights must both be [T, K] with T = {num_tokens}; got {list(expert_TK.shape)} "
            f"and {list(combine_TK.shape)}"
        )
    if expert_TK.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"expert ids must be int32 or int64; got {expert_TK.dtype}")
    stored = (part for weight in (weights.up, weights.down) for part in _stored(weight))
    if torch.is_grad_enabled() and any(part is not None and part.requires_grad for part in stored):
        raise ValueError(
            "quantised weights cannot be trained: no gradient reaches their codes, scales and zeros; detach them and "
            "train what lies around them, or pass dense weights"
        )


def _stored(weight: Tensor | QuantisedWeight) -> tuple[Tensor | None, ...]:
    return (weight.data, weight.scale, weight.zero) if isinstance(weight, QuantisedWeight) else ()


def _compute_dtype(x_TD: Tensor, weights: ExpertWeights) -> torch.dtype:
    if isinstance(weights.up, QuantisedWeight):
        return x_TD.dtype
    device = x_TD.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weights.up.dtype


@torch.library.custom_op(
    "expertier::experts",
    mutates_args=(),
    schema=f"(Tensor x, Tensor combine, Tensor expert, bool saves, {FlatWeights.schema()}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def experts(x: Tensor, combine: Tensor, expert: Tensor, saves: bool, *flat: object) -> tuple[Tensor, ...]:
    """Output, and for the backward pass: the pre-activation and the four tensors of `Groups`."""
    weights = unflatten(FlatWeights(*flat))
    x, expert, combine = x.contiguous(), expert.contiguous(), combine.contiguous()
    nothing = tuple(torch.empty(0, dtype=torch.int32, device=x.device) for _ in range(4))
    with on_device_of(x):
        if not saves and expert.numel() <= MAX_ROWS:
            return decode(x, expert, combine, weights, execute), x.new_empty(0), *nothing
        tiles = chosen_tiles(x.device, x.dtype, expert.numel(), weights)
        y, pre, grouped = forward(x, expert, combine, weights, tiles, execute, saves=saves)
    if not saves:
        return y, x.new_empty(0), *nothing
    return y, pre, grouped.order_N, grouped.position_N, grouped.total_C1, grouped.offset_C1


@experts.register_fake
def _(x: Tensor, combine: Tensor, expert: Tensor, saves: bool, *flat: object) -> tuple[Tensor, ...]:
    up = FlatWeights(*flat).up
    num_rows, num_slots = (expert.numel(), up.shape[0] + 1) if saves else (0, 0)
    pre = x.new_empty(num_rows, up.shape[1]) if saves else x.new_empty(0)

    def integers(size: int) -> Tensor:
        return torch.empty(size, dtype=torch.int32, device=x.device)

    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, pre, integers(num_rows), integers(num_rows), integers(num_slots), integers(num_slots)


@torch.library.custom_op(
    "expertier::experts_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor combine, Tensor pre, Tensor order, Tensor position, Tensor total, "
    f"Tensor offset, bool[] needs, {FlatWeights.schema()}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def experts_backward(
    grad: Tensor,
    x: Tensor,
    combine: Tensor,
    pre: Tensor,
    order: Tensor,
    position: Tensor,
    total: Tensor,
    offset: Tensor,
    needs: list[bool],
    *flat: object,
) -> tuple[Tensor, ...]:
    """Gradients of x, combine, up, down, up_bias and down_bias; empty ones where none is needed."""
    with on_device_of(x):
        weights = unflatten(FlatWeights(*flat))
        gradients = backward(
            grad.to(x.dtype).contiguous(),
            x.contiguous(),
            combine.contiguous(),
            pre,
            Groups(order, position, total, offset),
            weights,
            Needs(*needs),
            chosen_tiles(x.device, x.dtype, len(order), weights),
            execute,
        )
    found = (
        gradients.x_TD,
        gradients.combine_TK,
        gradients.up_COD,
        gradients.down_CDF,
        gradients.up_bias_CO,
        gradients.down_bias_CD,
    )
    return tuple(x.new_empty(0) if gradient is None else gradient for gradient in found)


@experts_backward.register_fake
def _(grad, x, combine, pre, order, position, total, offset, needs, *fields) -> tuple[Tensor, ...]:
    def like(tensor: Tensor | None, is_needed: bool, is_contiguous: bool) -> Tensor:
        if tensor is None or not is_needed:
            return x.new_empty(0)
        layout = torch.contiguous_format if is_contiguous else torch.preserve_format
        return torch.empty_like(tensor, memory_format=layout)

    flat = FlatWeights(*fields)
    tensors = (x, combine, flat.up, flat.down, flat.up_bias, flat.down_bias)
    is_contiguous = (True, True, False, False, True, True)
    return tuple(map(like, tensors, needs, is_contiguous))


def _keep_for_backward(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, combine, _, ctx.saves, *fields = inputs
    _, *saved = output
    flat = FlatWeights(*fields)
    ctx.mark_non_differentiable(*saved)
    ctx.plain = flat.without_tensors()
    ctx.save_for_backward(x, combine, *saved, *flat.tensors())


def _differentiate(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple:
    if not ctx.saves:
        raise ValueError("expertier::experts was called without saves=True, so nothing was kept for its backward pass")
    x, combine, pre, order, position, total, offset, *tensors = ctx.saved_tensors
    flat = ctx.plain.with_tensors(tuple(tensors))
    needs_x, needs_combine, _, _, *fields = ctx.needs_input_grad
    wanted = FlatWeights(*fields)
    needs = [needs_x, needs_combine, wanted.up, wanted.down, wanted.up_bias, wanted.down_bias]
    gradients = torch.ops.expertier.experts_backward(
        grad, x, combine, pre, order, position, total, offset, needs, *flat
    )
    leaves = (x, combine, flat.up, flat.down, flat.up_bias, flat.down_bias)
    grad_x, grad_combine, up, down, up_bias, down_bias = (
        gradient if is_needed and leaf is not None else None
        for gradient, is_needed, leaf in zip(gradients, needs, leaves, strict=True)
    )
    of_weights = FlatWeights.nothing()._replace(up=up, down=down, up_bias=up_bias, down_bias=down_bias)
    return grad_x, grad_combine, None, None, *of_weights


experts.register_autograd(_differentiate, setup_context=_keep_for_backward)


@contextlib.contextmanager
def on_device_of(x: Tensor) -> Iterator[None]:
    """Triton launches on the current device, which need not be that of the tensors."""
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        yield
