"""Experts as grouped matrix products: rows sorted by expert, one product per projection and expert that has rows.

It understands every layout that transformers' experts modules declare (bias, transposed weights, no gate, a norm after
the expert). Registered there as `expertier`: fused Triton kernels on a GPU, where they know the activation and the
number format, and this path everywhere else.

Shapes: T tokens, K slots, N = T * K rows, E experts, D model width, F expert width.
"""

import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import grouped_mm
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from .looped_product import looped_product

HAS_TRITON = importlib.util.find_spec("triton") is not None


def expertier_experts(experts: nn.Module, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """Weighted sum of the chosen experts' outputs, by kernels on a GPU, by `grouped_experts` elsewhere.

    Args:
        experts: an experts module of transformers or ours: projections and layout flags.
        x_TD: inputs.
        expert_TK: int64 ids; ids >= E contribute nothing.
        weight_TK: combine weights.

    Returns:
        [T, D] in the dtype of `x_TD`.
    """
    if x_TD.is_cuda and HAS_TRITON:
        # triton is imported only where it runs
        from .kernels import can_compute, fused_experts

        if can_compute(experts, x_TD):
            return fused_experts(experts, x_TD, expert_TK, weight_TK)
    return grouped_experts(experts, x_TD, expert_TK, weight_TK)


def grouped_experts(experts: nn.Module, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """Weighted sum of the chosen experts' outputs, in plain torch.

    Args:
        experts: an experts module of transformers or ours: projections and layout flags.
        x_TD: inputs.
        expert_TK: int64 ids; ids >= E contribute nothing.
        weight_TK: combine weights.

    Returns:
        [T, D] in the dtype of `x_TD`.
    """
    T, K = expert_TK.shape
    E = experts.num_experts
    expert_N, order_N = expert_TK.flatten().sort(stable=True)
    end_E = torch.bincount(expert_N, minlength=E)[:E].cumsum(0)
    ends = end_E.tolist() if _is_loop_in_python(x_TD) else end_E.to(torch.int32)
    expert_N = expert_N.clamp(max=E - 1) if experts.has_bias else expert_N

    x_ND = x_TD[order_N // K]
    if experts.has_gate:
        hidden_NF = experts._apply_gate(_project(x_ND, experts, "gate_up_proj", ends, expert_N))
    else:
        hidden_NF = experts.act_fn(_project(x_ND, experts, "up_proj", ends, expert_N))
    y_ND = _project(hidden_NF, experts, "down_proj", ends, expert_N)
    if experts.has_post_expert_norm:
        y_ND = experts.post_expert_norm(y_ND)
    if isinstance(ends, Tensor) or ends[-1] < T * K:
        weight_TK = torch.where(expert_TK < E, weight_TK, 0.0)
    if T == 1:
        return (weight_TK.flatten()[order_N, None] * y_ND).sum(dim=0, keepdim=True).to(x_TD.dtype)
    y_TKD = y_ND[_inverse(order_N)].view(T, K, -1)
    return (y_TKD * weight_TK[..., None]).sum(dim=1).to(x_TD.dtype)


def _is_loop_in_python(x_TD: Tensor) -> bool:
    return x_TD.device.type == "cpu" and not torch.compiler.is_compiling()


def _project(x_ND: Tensor, experts: nn.Module, name: str, ends: Sequence[int] | Tensor, expert_N: Tensor) -> Tensor:
    """Multiply each row by its own expert's matrix of that name; rows of no expert become zero (or some bias)."""
    weight = getattr(experts, name)
    device = weight.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    right = (weight if experts.is_transposed else weight.transpose(-2, -1)).to(dtype)
    if weight.is_cuda and dtype != torch.float64:
        y_ND = _grouped_mm(x_ND.to(dtype), right, ends)
    else:
        y_ND = looped_product(x_ND.to(dtype), right, ends)
    if experts.has_bias:
        y_ND = y_ND + getattr(experts, f"{name}_bias")[expert_N].to(dtype)
    return y_ND


def _grouped_mm(x_ND: Tensor, right_EDF: Tensor, offset_E: Tensor) -> Tensor:
    """`grouped_mm` leaves rows past the last offset uninitialised, forward and backward; here they are zero."""
    is_ours_N1 = (torch.arange(len(x_ND), device=x_ND.device) < offset_E[-1])[:, None]
    return torch.where(is_ours_N1, grouped_mm(torch.where(is_ours_N1, x_ND, 0.0), right_EDF, offs=offset_E), 0.0)


def _inverse(order_N: Tensor) -> Tensor:
    inverse_N = torch.empty_like(order_N)
    inverse_N[order_N] = torch.arange(len(order_N), device=order_N.device)
    return inverse_N


ALL_EXPERTS_FUNCTIONS.register("expertier", expertier_experts)
