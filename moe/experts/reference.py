"""The obvious loop over experts: slow, readable, the ground truth that every faster path is tested against.

Shapes: T tokens, K slots, E experts, D model width, F expert width.
"""

import torch
from torch import Tensor
from torch.nn.functional import silu


def swiglu_experts_reference(
    x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor, gate_up_proj: Tensor, down_proj: Tensor
) -> Tensor:
    """Weighted sum of SwiGLU experts, one token and one slot at a time.

    Args:
        x_TD: inputs; fp64 for gradient checks.
        expert_TK: int64 ids; ids outside 0..E-1 contribute nothing.
        weight_TK: floating-point combine weights; no normalisation is assumed.
        gate_up_proj: [E, 2F, D], gate rows before up rows.
        down_proj: [E, D, F], in the dtype of `gate_up_proj`.

    Returns:
        [T, D].

    Source: Shazeer 2020, arXiv:2002.05202, eq. 6; Shazeer et al. 2017, arXiv:1701.06538, eq. 1.
    """
    rows = []
    for x_D, experts, weights in zip(x_TD, expert_TK.tolist(), weight_TK, strict=True):
        y_D = torch.zeros_like(x_D)
        for expert, weight in zip(experts, weights, strict=True):
            if 0 <= expert < len(gate_up_proj):
                gate_F, up_F = (gate_up_proj[expert] @ x_D).chunk(2)
                y_D = y_D + weight * (down_proj[expert] @ (silu(gate_F) * up_F))
        rows.append(y_D)
    return torch.stack(rows)
