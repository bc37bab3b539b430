"""When training on a CPU is worth an autograd function in Python: norms, linear layers and rotations ask here."""

import torch
from torch import Tensor

from routing import is_transformed

# numbers in the input below which an autograd function in Python costs more than the memory traffic that it saves. Used
# by both records of training throughput (two cores of an Intel and of an AMD processor); no record of other values
FEWEST_NUMBERS = 1 << 18


def is_large_cpu_training(x: Tensor, *others: Tensor) -> bool:
    """Whether one of these tensors asks for a gradient on a CPU, and `x` has at least `FEWEST_NUMBERS` numbers.

    False under `torch.compile` and within `torch.func` transforms, which need torch's own operations.

    Args:
        x: the input, whose size decides.
        others: further operands that may ask for a gradient.
    """
    if x.device.type != "cpu" or x.numel() < FEWEST_NUMBERS or torch.compiler.is_compiling():
        return False
    is_training = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *others))
    return is_training and not is_transformed(x, *others)
