"""The functions between the projections, with their derivatives, for use inside kernels.

All are of one form: `y = inner(min(gate, limit)) * (clamp(up, -limit, limit) + shift)`, or `inner(gate)` without a
gate. SwiGLU has no limit and no shift; the experts of gpt-oss have limit 7, alpha 1.702 and shift 1.

Source: Shazeer 2020, arXiv:2002.05202, eq. 6; So et al. 2021, arXiv:2109.08668 (squared ReLU); gpt-oss, transformers'
`GptOssExperts._apply_gate`.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

INNER = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "identity")

# of the error function in GELU and its derivative, and of its approximation by tanh
SQRT_HALF = tl.constexpr(0.7071067811865476)
TWICE_SQRT_2_OVER_PI = tl.constexpr(1.5957691216057308)
INVERSE_SQRT_2_PI = tl.constexpr(0.3989422804014327)
CUBIC = tl.constexpr(0.044715)
THRICE_CUBIC = tl.constexpr(0.134145)


@dataclass(frozen=True)
class Activation:
    """What happens between the projections.

    Args:
        inner: `silu` (x * sigmoid(alpha * x)), `gelu`, `gelu_tanh`, `relu`, `relu2` or `identity`.
        gated: whether a second half of the up projection multiplies the result.
        alpha: slope inside `silu`; 1 is SiLU, 1.702 is the quick GELU.
        limit: bound of gate (from above) and up (both sides); None for no bound.
        shift: added to up before the product; 1 in gpt-oss.

    Raises:
        ValueError: if `inner` is unknown.
    """

    inner: str = "silu"
    gated: bool = True
    alpha: float = 1.0
    limit: float | None = None
    shift: float = 0.0

    def __post_init__(self) -> None:
        if self.inner not in INNER:
            raise ValueError(f"unknown activation {self.inner!r}; known are {', '.join(INNER)}")

    def arguments(self) -> dict:
        """The constexpr arguments of kernels."""
        return {
            "INNER": self.inner,
            "GATED": self.gated,
            "ALPHA": self.alpha,
            "LIMIT": self.limit,
            "SHIFT": self.shift,
        }

    def reference(self, gate: Tensor, up: Tensor | None) -> Tensor:
        """The same in plain torch, differentiable; the ground truth of the kernels."""
        if self.limit is not None:
            gate = gate.clamp(max=self.limit)
        y = _inner_reference(gate, self.inner, self.alpha)
        if up is None:
            return y
        if self.limit is not None:
            up = up.clamp(-self.limit, self.limit)
        return y * (up + self.shift)


SWIGLU = Activation()


def _inner_reference(x: Tensor, inner: str, alpha: float) -> Tensor:
    if inner == "silu":
        return x * torch.sigmoid(alpha * x)
    if inner in ("gelu", "gelu_tanh"):
        return torch.nn.functional.gelu(x, approximate="tanh" if inner == "gelu_tanh" else "none")
    if inner == "identity":
        return x
    return torch.relu(x) ** (2 if inner == "relu2" else 1)


@triton.jit
def inner_and_slope(x, INNER: tl.constexpr, ALPHA: tl.constexpr):
    """inner(x) and its derivative."""
    if INNER == "silu":
        s = tl.sigmoid(x * ALPHA)
        return x * s, s + x * s * (1 - s) * ALPHA
    elif INNER == "gelu":
        below = 0.5 * (1 + tl.erf(x * SQRT_HALF))
        return x * below, below + x * tl.exp(-0.5 * x * x) * INVERSE_SQRT_2_PI
    elif INNER == "gelu_tanh":
        # 0.5 * (1 + tanh(u)) = sigmoid(2u)
        s = tl.sigmoid((x + x * x * x * CUBIC) * TWICE_SQRT_2_OVER_PI)
        slope = (x * x * THRICE_CUBIC + 1) * TWICE_SQRT_2_OVER_PI
        return x * s, s + x * s * (1 - s) * slope
    elif INNER == "relu":
        return tl.maximum(x, 0.0), (x > 0).to(x.dtype)
    elif INNER == "relu2":
        positive = tl.maximum(x, 0.0)
        return positive * positive, 2 * positive
    else:
        return x, tl.full(x.shape, 1, x.dtype)


@triton.jit
def activate(gate, up, INNER: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, SHIFT: tl.constexpr):
    """A gated activation."""
    if LIMIT is not None:
        gate = tl.minimum(gate, LIMIT)
        up = tl.minimum(tl.maximum(up, -LIMIT), LIMIT)
    y, _ = inner_and_slope(gate, INNER, ALPHA)
    return y * (up + SHIFT)


@triton.jit
def activate_with_slopes(gate, up, INNER: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, SHIFT: tl.constexpr):
    """A gated activation and its derivatives with respect to gate and up."""
    if LIMIT is not None:
        is_gate_free = gate <= LIMIT
        is_up_free = (up >= -LIMIT) & (up <= LIMIT)
        gate = tl.minimum(gate, LIMIT)
        up = tl.minimum(tl.maximum(up, -LIMIT), LIMIT)
    y, slope = inner_and_slope(gate, INNER, ALPHA)
    gate_slope = slope * (up + SHIFT)
    up_slope = y
    if LIMIT is not None:
        gate_slope = tl.where(is_gate_free, gate_slope, 0.0)
        up_slope = tl.where(is_up_free, up_slope, 0.0)
    return y * (up + SHIFT), gate_slope, up_slope
