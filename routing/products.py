"""Products of many tokens with the few rows of a router's weight, when no gradient is asked for.

Shapes: T tokens, D width of the inputs, O outputs.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear

# what oneDNN needs to be quicker than the BLAS behind `linear`, which copies its inputs into another order
FEWEST_ROWS, LEAST_WIDTH = 512, 256


def narrow_linear(x_TD: Tensor, weight_OD: Tensor) -> Tensor:
    """`torch.nn.functional.linear(x, weight)`, [T, O]; on a CPU without gradient by oneDNN's float32 product."""
    needs_gradient = torch.is_grad_enabled() and (x_TD.requires_grad or weight_OD.requires_grad)
    if needs_gradient or torch.compiler.is_compiling() or not _suits_onednn(x_TD):
        return linear(x_TD, weight_OD)
    return torch.ops.mkldnn._linear_pointwise(x_TD, weight_OD, None, "none", [], "")


def _suits_onednn(x_TD: Tensor) -> bool:
    return (
        x_TD.device.type == "cpu"
        and x_TD.dtype == torch.float32
        and x_TD.shape[0] >= FEWEST_ROWS
        and x_TD.shape[1] >= LEAST_WIDTH
        and torch.backends.mkldnn.is_available()
    )
