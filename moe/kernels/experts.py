"""From an experts module of transformers, or ours, to the kernels: layout by its flags, activation by its behaviour.

Which function lies between the projections is found by comparing, on a few numbers, what the module computes with what
the kernels can compute; so a family with a gate of its own is either computed exactly or left to plain torch.
"""

import ctypes
import itertools
from dataclasses import astuple

import torch
from torch import Tensor, nn

from .launching.launch import TRITON_TYPES, is_interpreted
from .operators import compute_experts
from .weights.activation import INNER, Activation
from .weights.weights import ExpertWeights

LIMIT_NAMES = ("limit", "swiglu_limit")
ALPHA_NAMES = ("alpha", "swiglu_alpha")
# slope of x * sigmoid(alpha * x) that approximates GELU; Hendrycks and Gimpel 2016, arXiv:1606.08415, section 2
QUICK_GELU_ALPHA = 1.702
# numbers from -9 to 9 on which activations are compared: enough to tell the known ones apart
PROBE_ROWS, PROBE_FEATURES = 64, 4
# Ampere: older devices have no bfloat16 tensor cores and no asynchronous copies
OLDEST_CAPABILITY = (8, 0)

_recognised: dict[tuple, tuple | None] = {}


def can_compute(experts: nn.Module, x_TD: Tensor) -> bool:
    """Whether the kernels compute this module on this input's device.

    Args:
        experts: an experts module of transformers or ours.
        x_TD: its input, of which only the device is looked at.

    Returns:
        True if the kernels compute it; False for norms after the experts, unknown activations, and number formats or
        devices without kernels.
    """
    return can_compute_in(experts, experts.down_proj.dtype, x_TD.device)


def can_compute_in(experts: nn.Module, dtype: torch.dtype, device: torch.device) -> bool:
    """`can_compute` for weights of a given dtype that will lie on a given device."""
    # transformers before 5.23 has no norms after experts, and no such flag
    has_norm = getattr(experts, "has_post_expert_norm", False)
    if has_norm or dtype not in TRITON_TYPES or not _is_device_ready(device):
        return False
    return activation_of(experts) is not None


def fused_experts(experts: nn.Module, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """Weighted sum of the chosen experts' outputs, by kernels; the signature of a transformers experts implementation.

    Args:
        experts: an experts module that `can_compute` accepts.
        x_TD: tokens; their dtype is that of the result.
        expert_TK: int64 ids; ids >= E contribute nothing.
        weight_TK: floating-point combine weights; no normalisation is assumed.

    Returns:
        [T, D] in the dtype of `x_TD`.
    """
    return compute_experts(x_TD, expert_TK, weight_TK, weights_of(experts))


def weights_of(experts: nn.Module) -> ExpertWeights:
    """The module's parameters as the kernels see them: views, no copies.

    Args:
        experts: an experts module of transformers or ours.

    Raises:
        ValueError: if its activation is none that the kernels know.
    """
    activation = activation_of(experts)
    if activation is None:
        raise ValueError(f"{type(experts).__name__} has an activation without a kernel; use grouped_experts")
    name = "gate_up_proj" if experts.has_gate else "up_proj"
    up, down = getattr(experts, name), experts.down_proj
    if experts.is_transposed:
        up, down = up.transpose(-2, -1), down.transpose(-2, -1)
    return ExpertWeights(
        up,
        down,
        getattr(experts, f"{name}_bias") if experts.has_bias else None,
        experts.down_proj_bias if experts.has_bias else None,
        activation,
        is_halves=experts.is_concatenated,
    )


def activation_of(experts: nn.Module) -> Activation | None:
    """The kernels' name for what the module does between its projections; None if they have none.

    Args:
        experts: an experts module of transformers or ours.
    """
    settings = _settings_at(id(experts)) if torch.compiler.is_compiling() else _settings_of(experts)
    return None if settings is None else Activation(*settings)


@torch._dynamo.assume_constant_result
def _settings_at(address: int) -> tuple | None:
    """`torch.compile` of torch 2.11 takes an object's address as a constant, but not the object."""
    return _settings_of(ctypes.cast(address, ctypes.py_object).value)


def _settings_of(experts: nn.Module) -> tuple | None:
    """The fields of the module's activation; plain values, because `torch.compile` of torch 2.11 takes no others."""
    limit = _first_number(experts, LIMIT_NAMES)
    alpha = _first_number(experts, ALPHA_NAMES)
    key = (type(experts), repr(getattr(experts, "act_fn", None)), experts.has_gate, limit, alpha)
    if key not in _recognised:
        found = _recognise(experts, limit, alpha)
        _recognised[key] = None if found is None else astuple(found)
    return _recognised[key]


def _first_number(experts: nn.Module, names: tuple[str, ...]) -> float | None:
    values = [getattr(experts, name, None) for name in names]
    return next((float(value) for value in values if isinstance(value, int | float)), None)


@torch.no_grad()
def _recognise(experts: nn.Module, limit: float | None, alpha: float | None) -> Activation | None:
    width = PROBE_FEATURES * (2 if experts.has_gate else 1)
    probe = torch.linspace(-9, 9, PROBE_ROWS * width, dtype=torch.float32).view(width, PROBE_ROWS).T.contiguous()
    # both halves of a gate must see large and small values in all combinations
    probe = probe[:, torch.randperm(width, generator=torch.Generator().manual_seed(0))]
    try:
        wanted = experts._apply_gate(probe) if experts.has_gate else experts.act_fn(probe)
    except (RuntimeError, TypeError, AttributeError):
        return None
    gate, up = probe, None
    if experts.has_gate:
        gate, up = probe.chunk(2, -1) if experts.is_concatenated else (probe[:, ::2], probe[:, 1::2])
    alphas = {1.0, QUICK_GELU_ALPHA, *([] if alpha is None else [alpha])}
    limits = [None, *([] if limit is None else [limit])]
    shifts = [0.0, 1.0] if experts.has_gate else [0.0]
    for inner, alpha_, limit_, shift in itertools.product(INNER, sorted(alphas), limits, shifts):
        candidate = Activation(inner, experts.has_gate, alpha_, limit_, shift)
        found = candidate.reference(gate, up)
        if found.shape == wanted.shape and torch.allclose(found, wanted.float(), rtol=1e-5, atol=1e-5):
            return candidate
    return None


@torch._dynamo.assume_constant_result
def _is_device_ready(device: torch.device) -> bool:
    if is_interpreted():
        return True
    if device.type != "cuda":
        return False
    return bool(torch.version.hip) or torch.cuda.get_device_capability(device) >= OLDEST_CAPABILITY
