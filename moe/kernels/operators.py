"""The kernels as operators of PyTorch: with autograd, and with fake implementations so that `torch.compile` works.

`compute_experts` is what other code calls. `expertier::experts` takes the fields of `ExpertWeights`, `QuantisedWeight`
and `Activation` one by one, because operators take tensors and plain values only.

Shapes: T tokens, K experts per token, N = T * K routed rows, E experts, C slots, O up outputs, D model width,
F expert width.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from .decode.rows import MAX_ROWS, decode
from .grouped.backward import Needs, backward
from .grouped.forward import forward
from .grouped.metadata import Groups
from .launching.launch import execute
from .launching.tiles import chosen_tiles
from .weights.activation import Activation
from .weights.quantise import QuantisedWeight
from .weights.weights import ExpertWeights

DENSE = "dense"
# arguments of `expertier::experts`: those that can have a gradient; tensors from `slot` on
LEAVES, STORED = 6, 5


def compute_experts(x_TD: Tensor, expert_TK: Tensor, combine_TK: Tensor, weights: ExpertWeights) -> Tensor:
    """Weighted sum of each token's experts: few tokens without gradient take the decode path, others the grouped path.

    Args:
        x_TD: tokens.
        expert_TK: int32 or int64 expert ids; ids outside 0..E-1, and experts without a slot, contribute nothing.
        combine_TK: combine weights.
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
    dtype = _compute_dtype(x_TD, weights)
    up, up_scale, up_zero = _stored(weights.up, dtype)
    down, down_scale, down_zero = _stored(weights.down, dtype)
    up_bias, down_bias = (None if bias is None else bias.to(dtype) for bias in (weights.up_bias, weights.down_bias))
    x = x_TD.to(dtype)
    leaves = (x, combine_TK, up, down, up_bias, down_bias)
    saves = torch.is_grad_enabled() and any(leaf is not None and leaf.requires_grad for leaf in leaves)
    if saves and weights.slot_E is not None and (up.requires_grad or down.requires_grad):
        raise ValueError("weights in cache slots cannot be trained; pass slot_E=None or weights without requires_grad")
    y_TD, *_ = torch.ops.expertier.experts(
        *leaves, expert_TK, weights.slot_E, up_scale, up_zero, down_scale, down_zero, *_settings(weights), saves
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


def _compute_dtype(x_TD: Tensor, weights: ExpertWeights) -> torch.dtype:
    if isinstance(weights.up, QuantisedWeight):
        return x_TD.dtype
    device = x_TD.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weights.up.dtype


def _stored(weight: Tensor | QuantisedWeight, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What the operators take of a projection: weights or codes, scale, zero."""
    if not isinstance(weight, QuantisedWeight):
        return weight.to(dtype), None, None
    stored = (weight.data, weight.scale, weight.zero)
    if torch.is_grad_enabled() and any(part is not None and part.requires_grad for part in stored):
        raise ValueError(
            "quantised weights cannot be trained: no gradient reaches their codes, scales and zeros; detach them and "
            "train what lies around them, or pass dense weights"
        )
    return stored


def _settings(weights: ExpertWeights) -> tuple:
    """The plain values among the operators' arguments: number format, activation, layout."""
    up, down, activation = weights.up, weights.down, weights.activation
    is_quantised = isinstance(up, QuantisedWeight)
    return (
        up.format if is_quantised else DENSE,
        [up.out_group, up.in_group, down.out_group, down.in_group] if is_quantised else [],
        activation.inner,
        activation.gated,
        activation.alpha,
        activation.limit,
        activation.shift,
        weights.is_halves,
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
    up_scale: Tensor | None,
    up_zero: Tensor | None,
    down_scale: Tensor | None,
    down_zero: Tensor | None,
    format: str,  # noqa: A002
    groups: list[int],
    inner: str,
    gated: bool,
    alpha: float,
    limit: float | None,
    shift: float,
    is_halves: bool,
    saves: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Output, and for the backward pass: what preceded the activation and the four tensors of `Groups`."""
    weights = _weights(
        up, down, up_bias, down_bias, slot, up_scale, up_zero, down_scale, down_zero,
        format, groups, inner, gated, alpha, limit, shift, is_halves,
    )  # fmt: skip
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
def _(x, combine, up, down, up_bias, down_bias, expert, *others) -> tuple[Tensor, ...]:
    saves = others[-1]
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
    up_scale: Tensor | None,
    up_zero: Tensor | None,
    down_scale: Tensor | None,
    down_zero: Tensor | None,
    pre: Tensor,
    order: Tensor,
    position: Tensor,
    total: Tensor,
    offset: Tensor,
    format: str,  # noqa: A002
    groups: list[int],
    inner: str,
    gated: bool,
    alpha: float,
    limit: float | None,
    shift: float,
    is_halves: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `expertier::experts` in the order of its first arguments; empty ones where none is needed."""
    weights = _weights(
        up, down, up_bias, down_bias, slot, up_scale, up_zero, down_scale, down_zero,
        format, groups, inner, gated, alpha, limit, shift, is_halves,
    )  # fmt: skip
    with on_device_of(x):
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
def _(grad, x, combine, up, down, up_bias, down_bias, *others) -> tuple[Tensor, ...]:
    needs = others[-1]

    def like(tensor: Tensor | None, is_needed: bool, is_contiguous: bool) -> Tensor:
        if tensor is None or not is_needed:
            return x.new_empty(0)
        layout = torch.contiguous_format if is_contiguous else torch.preserve_format
        return torch.empty_like(tensor, memory_format=layout)

    tensors = (x, combine, up, down, up_bias, down_bias)
    is_contiguous = (True, True, False, False, True, True)
    return tuple(map(like, tensors, needs, is_contiguous))


def _keep_for_backward(ctx, inputs: tuple, output: tuple) -> None:
    leaves, (_, *others) = inputs[:LEAVES], inputs[LEAVES:]
    _, *saved = output
    ctx.mark_non_differentiable(*saved)
    *ctx.settings, ctx.saves = others[STORED:]
    ctx.save_for_backward(*leaves, *others[:STORED], *saved)


def _differentiate(ctx, grad: Tensor, *_: Tensor | None) -> tuple:
    if not ctx.saves:
        raise ValueError("expertier::experts was called without saves=True, so nothing was kept for its backward pass")
    needs = list(ctx.needs_input_grad[:LEAVES])
    gradients = torch.ops.expertier.experts_backward(grad, *ctx.saved_tensors, *ctx.settings, needs)
    has_bias = [tensor is not None for tensor in ctx.saved_tensors[4:LEAVES]]
    is_wanted = [*needs[:4], *(need and has for need, has in zip(needs[4:], has_bias, strict=True))]
    found = [gradient if wanted else None for gradient, wanted in zip(gradients, is_wanted, strict=True)]
    return *found, None, *(None for _ in range(STORED)), *(None for _ in ctx.settings), None


experts.register_autograd(_differentiate, setup_context=_keep_for_backward)


def _weights(
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    slot: Tensor | None,
    up_scale: Tensor | None,
    up_zero: Tensor | None,
    down_scale: Tensor | None,
    down_zero: Tensor | None,
    format: str,  # noqa: A002
    groups: list[int],
    inner: str,
    gated: bool,
    alpha: float,
    limit: float | None,
    shift: float,
    is_halves: bool,
) -> ExpertWeights:
    if format != DENSE:
        codes_per_byte = 2 if format == "int4" else 1
        up, down = (
            QuantisedWeight(format, data, scale, zero, *group, data.shape[2] * codes_per_byte)
            for data, scale, zero, group in (
                (up, up_scale, up_zero, groups[:2]),
                (down, down_scale, down_zero, groups[2:]),
            )
        )
    activation = Activation(inner, gated, alpha, limit, shift)
    up_bias, down_bias = (None if bias is None else bias.contiguous() for bias in (up_bias, down_bias))
    return ExpertWeights(up, down, up_bias, down_bias, activation, is_halves, slot)


@contextlib.contextmanager
def on_device_of(x: Tensor) -> Iterator[None]:
    """Triton launches on the current device, which need not be that of the tensors."""
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        yield
