"""Experts as grouped matrix products: rows sorted by expert, one product per projection and expert that has rows.

It understands every layout that transformers' experts modules declare (bias, transposed weights, no gate, a norm after
the expert). Registered there as `expertier`: fused Triton kernels on a GPU, where they know the activation and the
number format, and this path everywhere else.

Shapes: T tokens, K slots, N = T * K rows, E experts, D model width, F expert width.
"""

import importlib.util

import torch
from torch import Tensor, nn
from torch.nn.functional import grouped_mm
from transformers.activations import SiLUActivation
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate

from routing import is_transformed

from .blockwise import blockwise_experts
from .looped_product import looped_product
from .sorted_rows import Groups, combine, groups_of, product_dtype

# routed rows up to which, without gradient, a loop in Python costs less than looking at every expert; two cores of an
# Intel processor, record 2026-11-21_kernels-cpu
LOOPED_ROWS = 32
# with gradient, experts per row and bytes of weights from which a loop that leaves idle experts out is faster. For one
# token it took 0.73 of the time with 200 MB of weights and 0.82 with 100 MB, but 1.03 with 25 MB; with as many rows as
# experts 1.07; same record
LOOPED_EXPERTS = 4
LOOPED_BYTES = 32 << 20
# rows per expert from which blocks save more in the cache than they cost in Python; used by both records of training
# throughput (256 and more rows per expert); no record of other values
BLOCKWISE_ROWS = 192
HAS_TRITON = importlib.util.find_spec("triton") is not None


def expertier_experts(experts: nn.Module, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """Weighted sum of the chosen experts' outputs, by kernels on a GPU, by `grouped_experts` elsewhere.

    Args:
        experts: an experts module of transformers or ours: projections and layout flags.
        x_TD: tokens; their dtype is that of the result.
        expert_TK: int64 ids; ids >= E contribute nothing.
        weight_TK: floating-point combine weights; no normalisation is assumed.

    Returns:
        [T, D] in the dtype of `x_TD`.
    """
    if x_TD.is_cuda and HAS_TRITON:
        # triton is imported only where it runs
        from ..kernels import can_compute, fused_experts

        if can_compute(experts, x_TD):
            return fused_experts(experts, x_TD, expert_TK, weight_TK)
    return grouped_experts(experts, x_TD, expert_TK, weight_TK)


def grouped_experts(experts: nn.Module, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """Weighted sum of the chosen experts' outputs, in plain torch.

    Args:
        experts: an experts module of transformers or ours: projections and layout flags.
        x_TD: tokens; their dtype is that of the result.
        expert_TK: int64 ids; ids >= E contribute nothing.
        weight_TK: floating-point combine weights; no normalisation is assumed.

    Returns:
        [T, D] in the dtype of `x_TD`.

    Raises:
        ValueError: if an id is negative, where that costs no waiting.
    """
    T, K = expert_TK.shape
    E = experts.num_experts
    expert_N, order_N = expert_TK.flatten().sort(stable=True)
    groups = groups_of(expert_N, E)
    is_blockwise = groups.ends is not None and T * K >= BLOCKWISE_ROWS * E and _is_swiglu(experts)
    if is_blockwise and not is_transformed(x_TD, weight_TK, experts.gate_up_proj, experts.down_proj):
        rights = (_right(experts, "gate_up_proj"), _right(experts, "down_proj"))
        return blockwise_experts(x_TD, weight_TK, *rights, order_N, groups.ends, product_dtype(experts.down_proj))
    expert_N = expert_N.clamp(max=E - 1) if experts.has_bias else expert_N

    x_ND = _rows(x_TD, order_N // K)
    if experts.has_gate:
        hidden_NF = experts._apply_gate(_project(x_ND, experts, "gate_up_proj", groups, expert_N))
    else:
        hidden_NF = experts.act_fn(_project(x_ND, experts, "up_proj", groups, expert_N))
    y_ND = _project(hidden_NF, experts, "down_proj", groups, expert_N)
    if getattr(experts, "has_post_expert_norm", False):  # older than transformers 5.23: no such layout
        y_ND = experts.post_expert_norm(y_ND)
    if not groups.has_all_rows:
        weight_TK = torch.where(expert_TK < E, weight_TK, 0.0)
    return combine(y_ND, order_N, weight_TK, x_TD.dtype)


def _is_swiglu(experts: nn.Module) -> bool:
    """Whether the experts are `down(silu(gate) * up)` and nothing else."""
    is_plain = experts.has_gate and experts.is_concatenated and not experts.has_bias
    has_norm = getattr(experts, "has_post_expert_norm", False)  # older than transformers 5.23: no such layout
    is_silu = isinstance(getattr(experts, "act_fn", None), nn.SiLU | SiLUActivation)
    return is_plain and not has_norm and is_silu and type(experts)._apply_gate is _default_apply_gate


def _right(experts: nn.Module, name: str) -> Tensor:
    """A projection as the right factor of a product."""
    weight = getattr(experts, name)
    return weight if experts.is_transposed else weight.transpose(-2, -1)


def _rows(x_TD: Tensor, token_N: Tensor) -> Tensor:
    """Gather rows; `index_select` is faster, but on a GPU its gradient adds in no fixed order."""
    return x_TD[token_N] if x_TD.is_cuda else x_TD.index_select(0, token_N)


def _project(x_ND: Tensor, experts: nn.Module, name: str, groups: Groups, expert_N: Tensor) -> Tensor:
    """Multiply each row by its own expert's matrix of that name; rows of no expert become zero, or some bias."""
    right = _right(experts, name)
    dtype = product_dtype(right)
    y_ND = _product(x_ND.to(dtype), right.to(dtype), groups)
    if experts.has_bias:
        y_ND = y_ND + getattr(experts, f"{name}_bias")[expert_N].to(dtype)
    return y_ND


def _product(x_ND: Tensor, right_EDF: Tensor, groups: Groups) -> Tensor:
    """The faster of two ways: a loop over the experts in use, or `grouped_mm`, which looks at all of them."""
    # compiled, exported or batched: the loop as one operator
    is_opaque = not x_ND.is_cuda and groups.ends is None
    is_training = torch.is_grad_enabled() and (x_ND.requires_grad or right_EDF.requires_grad)
    is_plain = groups.ends is not None and not is_transformed(x_ND, right_EDF)
    is_few = is_plain and _is_few(groups.num_rows, right_EDF, is_training)
    if x_ND.dtype == torch.float64 or is_opaque or is_few:
        return looped_product(x_ND, right_EDF, groups.ends or groups.end_E)
    if groups.has_all_rows:
        return grouped_mm(x_ND, right_EDF, offs=groups.end_E)
    # grouped_mm leaves rows past the last offset uninitialised, forward and backward
    is_ours_N1 = (torch.arange(groups.num_rows, device=x_ND.device) < groups.end_E[-1])[:, None]
    y_ND = grouped_mm(torch.where(is_ours_N1, x_ND, 0.0), right_EDF, offs=groups.end_E)
    return torch.where(is_ours_N1, y_ND, 0.0)


def _is_few(num_rows: int, right_EDF: Tensor, is_training: bool) -> bool:
    if is_training:
        return num_rows * LOOPED_EXPERTS <= len(right_EDF) and right_EDF.nbytes >= LOOPED_BYTES
    return num_rows <= LOOPED_ROWS


ALL_EXPERTS_FUNCTIONS.register("expertier", expertier_experts)
