"""The kernels as operators of PyTorch: with autograd, and with fake implementations so that `torch.compile` works.

`compute_experts` is what other code calls. `expertier::experts` computes with dense weights and can be differentiated;
`expertier::quantised_experts` computes with quantised ones.

Shapes: T tokens, K experts per token, N = T * K routed rows, E experts, C slots, O up outputs, D model width,
F expert width.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from .activation import Activation
from .backward import Needs, backward
from .decode import MAX_ROWS, decode
from .forward import forward
from .launch import execute
from .metadata import Groups
from .quantise import QuantisedWeight
from .tiles import chosen_tiles
from .weights import ExpertWeights


def compute_experts(x_TD: Tensor, expert_TK: Tensor, combine_TK: Tensor, weights: ExpertWeights) -> Tensor:
    """Weighted sum of each token's experts: few tokens without gradient take the decode path, others the grouped path.

    Args:
        x_TD: tokens.
        expert_TK: int32 or int64 expert ids; ids outside 0..E-1, and experts without a slot, contribute nothing.
        combine_TK: combine weights.
        weights: the experts; products are computed in the dtype of dense weights (of autocast, where it is on), or of
            `x_TD` for quantised ones.

    Returns:
        [T, D] in the dtype of `x_TD`.

    Raises:
        ValueError: if shapes do not fit, or a gradient is asked of quantised weights or of weights in cache slots.
    """
    _check(x_TD, expert_TK, combine_TK, weights)
    if x_TD.shape[0] == 0 or expert_TK.shape[1] == 0:
        return torch.zeros_like(x_TD)
    activation = weights.activation
    settings = (
        activation.inner,
        activation.gated,
        activation.alpha,
        activation.limit,
        activation.shift,
        weights.is_halves,
    )
    if isinstance(weights.up, QuantisedWeight):
        return _compute_quantised(x_TD, expert_TK, combine_TK, weights, settings)
    up, down, up_bias, down_bias = weights.up, weights.down, weights.up_bias, weights.down_bias
    device = x_TD.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else up.dtype
    biases = [None if bias is None else bias.to(dtype) for bias in (up_bias, down_bias)]
    tensors = (x_TD.to(dtype), combine_TK, up.to(dtype), down.to(dtype), *biases)
    saves = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
    if saves and weights.slot_E is not None and (up.requires_grad or down.requires_grad):
        raise ValueError("weights in cache slots cannot be trained; pass slot_E=None or weights without requires_grad")
    x, combine, up, down, up_bias, down_bias = tensors
    y_TD, *_ = torch.ops.expertier.experts(
        x, combine, up, down, up_bias, down_bias, expert_TK, weights.slot_E, *settings, saves
    )
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


def _compute_quantised(
    x_TD: Tensor, expert_TK: Tensor, combine_TK: Tensor, weights: ExpertWeights, settings: tuple
) -> Tensor:
    if torch.is_grad_enabled() and (x_TD.requires_grad or combine_TK.requires_grad):
        raise ValueError("quantised experts have no backward pass; use torch.no_grad() or dense weights")
    up, down = weights.up, weights.down
    stored = (up.data, up.scale, up.zero, down.data, down.scale, down.zero)
    groups = (up.format, up.out_group, up.in_group, down.out_group, down.in_group, down.num_inputs)
    return torch.ops.expertier.quantised_experts(
        x_TD, combine_TK, expert_TK, *stored, weights.up_bias, weights.down_bias, weights.slot_E, *groups, *settings
    )


@torch.library.custom_op("expertier::experts", mutates_args=())
def experts(
    x: Tensor,
    combine: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    expert: Tensor,
    slot: Tensor | None,
    inner: str,
    gated: bool,
    alpha: float,
    limit: float | None,
    shift: float,
    is_halves: bool,
    saves: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Output, and for the backward pass: what preceded the activation and the four tensors of `Groups`."""
    weights = _dense(up, down, up_bias, down_bias, slot, inner, gated, alpha, limit, shift, is_halves)
    x, expert, combine = x.contiguous(), expert.contiguous(), combine.contiguous()
    nothing = tuple(torch.empty(0, dtype=torch.int32, device=x.device) for _ in range(4))
    with on_device_of(x):
        if not saves and expert.numel() <= MAX_ROWS:
            return decode(x, expert, combine, weights, execute), x.new_empty(0), *nothing
        tiles = chosen_tiles(x.device, x.dtype, expert.numel(), weights.num_slots)
        y, pre, groups = forward(x, expert, combine, weights, tiles, execute, saves=saves)
    if not saves:
        return y, x.new_empty(0), *nothing
    return y, pre, groups.order_N, groups.position_N, groups.total_C1, groups.offset_C1


@experts.register_fake
def _(
    x, combine, up, down, up_bias, down_bias, expert, slot, inner, gated, alpha, limit, shift, is_halves, saves
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    num_rows, num_slots = (expert.numel(), up.shape[0] + 1) if saves else (0, 0)
    pre = x.new_empty(num_rows, up.shape[1]) if saves else x.new_empty(0)

    def integers(size: int) -> Tensor:
        return torch.empty(size, dtype=torch.int32, device=x.device)

    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, pre, integers(num_rows), integers(num_rows), integers(num_slots), integers(num_slots)


@torch.library.custom_op("expertier::experts_backward", mutates_args=())
def experts_backward(
    grad: Tensor,
    x: Tensor,
    combine: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    slot: Tensor | None,
    pre: Tensor,
    order: Tensor,
    position: Tensor,
    total: Tensor,
    offset: Tensor,
    inner: str,
    gated: bool,
    alpha: float,
    limit: float | None,
    shift: float,
    is_halves: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `expertier::experts` in the order of its first arguments; empty ones where none is needed."""
    weights = _dense(up, down, up_bias, down_bias, slot, inner, gated, alpha, limit, shift, is_halves)
    with on_device_of(x):
        gradients = backward(
            grad.to(x.dtype).contiguous(),
            x.contiguous(),
            combine.contiguous(),
            pre,
            Groups(order, position, total, offset),
            weights,
            Needs(*needs),
            chosen_tiles(x.device, x.dtype, len(order), weights.num_slots),
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
def _(
    grad, x, combine, up, down, up_bias, down_bias, slot, pre, order, position, total, offset, inner, gated, alpha,
    limit, shift, is_halves, needs,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    def like(tensor: Tensor | None, is_needed: bool, is_contiguous: bool) -> Tensor:
        if tensor is None or not is_needed:
            return x.new_empty(0)
        layout = torch.contiguous_format if is_contiguous else torch.preserve_format
        return torch.empty_like(tensor, memory_format=layout)

    tensors = (x, combine, up, down, up_bias, down_bias)
    is_contiguous = (True, True, False, False, True, True)
    return tuple(map(like, tensors, needs, is_contiguous))


def _keep_for_backward(ctx, inputs: tuple, output: tuple) -> None:
    x, combine, up, down, up_bias, down_bias, _, slot, *settings, saves = inputs
    _, *saved = output
    ctx.mark_non_differentiable(*saved)
    ctx.saves = saves
    ctx.settings = settings
    ctx.save_for_backward(x, combine, up, down, up_bias, down_bias, slot, *saved)


def _differentiate(ctx, grad: Tensor, *_: Tensor | None) -> tuple:
    if not ctx.saves:
        raise ValueError("expertier::experts was called without saves=True, so nothing was kept for its backward pass")
    needs = list(ctx.needs_input_grad[:6])
    gradients = torch.ops.expertier.experts_backward(grad, *ctx.saved_tensors, *ctx.settings, needs)
    has_bias = [tensor is not None for tensor in ctx.saved_tensors[4:6]]
    is_wanted = [*needs[:4], *(need and has for need, has in zip(needs[4:], has_bias, strict=True))]
    found = [gradient if wanted else None for gradient, wanted in zip(gradients, is_wanted, strict=True)]
    return *found, None, None, *(None for _ in ctx.settings), None


experts.register_autograd(_differentiate, setup_context=_keep_for_backward)


@torch.library.custom_op("expertier::quantised_experts", mutates_args=())
def quantised_experts(
    x: Tensor,
    combine: Tensor,
    expert: Tensor,
    up: Tensor,
    up_scale: Tensor,
    up_zero: Tensor | None,
    down: Tensor,
    down_scale: Tensor,
    down_zero: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    slot: Tensor | None,
    format: str,  # noqa: A002
    up_out_group: int,
    up_in_group: int,
    down_out_group: int,
    down_in_group: int,
    num_features: int,
    inner: str,
    gated: bool,
    alpha: float,
    limit: float | None,
    shift: float,
    is_halves: bool,
) -> Tensor:
    """Output with quantised weights; the arguments are the fields of `QuantisedWeight` and `Activation`."""
    weights = ExpertWeights(
        QuantisedWeight(format, up, up_scale, up_zero, up_out_group, up_in_group, x.shape[1]),
        QuantisedWeight(format, down, down_scale, down_zero, down_out_group, down_in_group, num_features),
        up_bias,
        down_bias,
        Activation(inner, gated, alpha, limit, shift),
        is_halves,
        slot,
    )
    x, expert, combine = x.contiguous(), expert.contiguous(), combine.contiguous()
    with on_device_of(x):
        if expert.numel() <= MAX_ROWS:
            return decode(x, expert, combine, weights, execute)
        tiles = chosen_tiles(x.device, x.dtype, expert.numel(), weights.num_slots)
        return forward(x, expert, combine, weights, tiles, execute, saves=False)[0]


@quantised_experts.register_fake
def _(x, *_) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _dense(
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    slot: Tensor | None,
    inner: str,
    gated: bool,
    alpha: float,
    limit: float | None,
    shift: float,
    is_halves: bool,
) -> ExpertWeights:
    activation = Activation(inner, gated, alpha, limit, shift)
    up_bias, down_bias = (None if bias is None else bias.contiguous() for bias in (up_bias, down_bias))
    return ExpertWeights(up, down, up_bias, down_bias, activation, is_halves, slot)


@contextlib.contextmanager
def on_device_of(x: Tensor) -> Iterator[None]:
    """Triton launches on the current device, which need not be that of the tensors."""
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        yield
