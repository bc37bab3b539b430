"""Experts as grouped matrix products: rows sorted by expert, one product per projection, in plain torch.

It understands every layout that transformers' experts modules declare (bias, transposed weights, no gate, a norm after
the expert), and is registered there as `expertier`.

Shapes: T tokens, K slots, N = T * K rows, E experts, D model width, F expert width.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import grouped_mm
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS


def grouped_experts(experts: nn.Module, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """Weighted sum of the chosen experts' outputs.

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
    offset_E = torch.bincount(expert_N, minlength=E)[:E].cumsum(0).to(torch.int32)
    is_ours_N1 = (expert_N < E)[:, None]
    bias_id_N = expert_N.clamp(max=E - 1)

    # rows past the last offset stay uninitialised in what grouped_mm returns, forward and backward
    x_ND = torch.where(is_ours_N1, x_TD[order_N // K], 0.0)
    if experts.has_gate:
        hidden = _project(x_ND, experts, "gate_up_proj", offset_E, bias_id_N)
        hidden_NF = experts._apply_gate(hidden)
    else:
        hidden_NF = experts.act_fn(_project(x_ND, experts, "up_proj", offset_E, bias_id_N))
    y_ND = _project(hidden_NF, experts, "down_proj", offset_E, bias_id_N)
    if experts.has_post_expert_norm:
        y_ND = experts.post_expert_norm(y_ND)
    y_ND = torch.where(is_ours_N1, y_ND * weight_TK.flatten()[order_N, None], 0.0)
    y_TKD = y_ND[_inverse(order_N)].view(T, K, -1)
    return y_TKD.sum(dim=1).to(x_TD.dtype)


def _project(x_ND: Tensor, experts: nn.Module, name: str, offset_E: Tensor, bias_id_N: Tensor) -> Tensor:
    """Multiply each row by its own expert's matrix of that name."""
    weight = getattr(experts, name)
    device = weight.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    right = weight if experts.is_transposed else weight.transpose(-2, -1)
    y_ND = _grouped_product(x_ND.to(dtype), right.to(dtype), offset_E)
    if experts.has_bias:
        y_ND = y_ND + getattr(experts, f"{name}_bias")[bias_id_N].to(dtype)
    return y_ND


def _grouped_product(x_ND: Tensor, right_EDF: Tensor, offset_E: Tensor) -> Tensor:
    if x_ND.dtype != torch.float64:
        return grouped_mm(x_ND, right_EDF, offs=offset_E)
    ends = offset_E.tolist()
    pieces = [x_ND[start:end] @ right for start, end, right in zip([0, *ends], ends, right_EDF, strict=False)]
    tail = x_ND.new_zeros(len(x_ND) - ends[-1], right_EDF.shape[-1])
    return torch.cat([*pieces, tail])


def _inverse(order_N: Tensor) -> Tensor:
    inverse_N = torch.empty_like(order_N)
    inverse_N[order_N] = torch.arange(len(order_N), device=order_N.device)
    return inverse_N


ALL_EXPERTS_FUNCTIONS.register("expertier", grouped_experts)
