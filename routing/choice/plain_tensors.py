"""Which tensors code of our own may compute with past PyTorch's dispatcher, by address or by an autograd function.

A compiler, an exporter and `torch.func` call a module with tensors that stand for others. Such a tensor has no memory
(its address is 0), or memory that is not the value, so C that is given its address overwrites other memory.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

_FAKE, _PROXY, _FUNCTIONAL = (
    torch._C._TorchDispatchModeKey.FAKE,
    torch._C._TorchDispatchModeKey.PROXY,
    torch._C._TorchDispatchModeKey.FUNCTIONAL,
)
_TORCHS_OWN = (Tensor, Parameter)


def has_plain_memory(*tensors: Tensor) -> bool:
    """Whether C may read these tensors by address now, and what it writes is what a caller sees.

    Ask this of every tensor whose `data_ptr()` goes to C, in the call that passes it, and hold the tensors in local
    variables until C returns. Where the answer is no, torch's own operations compute the same.

    Args:
        tensors: on any device, in any layout.

    Returns:
        False under `torch.compile`, `torch.export`, `make_fx` and `torch.jit.trace`, within `torch.func` transforms and
        for tangents of forward-mode autodiff, for tensor subclasses (fake tensors among them), for tensors of other
        devices or layouts, and for views that are negated or zero by a flag alone.
    """
    if _is_traced() or torch._C._are_functorch_transforms_active() or _has_tangent(tensors):
        return False
    return all(map(_is_memory, tensors))


def has_known_values(tensor: Tensor) -> bool:
    """Whether `tolist()` gives this tensor's values at once: it lies on a CPU and is neither traced nor batched."""
    if _is_traced():
        return False
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        if torch._C._functorch.is_batchedtensor(tensor):
            return False
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor.device.type == "cpu" and type(tensor) in _TORCHS_OWN


def is_transformed(*tensors: Tensor) -> bool:
    """Whether `torch.func` (vmap, grad, jvp, ...), forward-mode autodiff or `make_fx` is at work on this call.

    An autograd function without rules for them raises there, or its gradient is lost, so torch's own operations must
    compute. Under `torch.compile`, which traces through autograd functions, the answer is False.

    Args:
        tensors: those that the function would differentiate.
    """
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or _is_traced() or _has_tangent(tensors)


def _is_traced() -> bool:
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    mode_of = torch._C._get_dispatch_mode
    return mode_of(_FAKE) is not None or mode_of(_PROXY) is not None or mode_of(_FUNCTIONAL) is not None


def _has_tangent(tensors: Sequence[Tensor]) -> bool:
    # no level is the usual case, and unpacking every tensor would cost more than the choice of a token's experts
    if forward_ad._current_level < 0:
        return False
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def _is_memory(tensor: Tensor) -> bool:
    is_real = type(tensor) in _TORCHS_OWN and not torch._is_functional_tensor(tensor)
    if not is_real or tensor.device.type != "cpu" or tensor.layout != torch.strided:
        return False
    return not (tensor.is_neg() or tensor.is_conj() or tensor._is_zerotensor())
