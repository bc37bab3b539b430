"""Linear layers with adapters, and norms, whose own weights are frozen bfloat16: computed by our C in both directions.

Autograd keeps nothing of them but their input, which several of them share. PEFT and transformers would keep float32
copies of it: more than half of what a layer keeps in all.

Shapes: n rows, I inputs, O outputs, D model width, r rank of an adapter.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...compute.adapters import ADAPTER, LowRank
from ...compute.norms import TokenNorm, find_norm
from ...compute.orders import Order
from .low_rank import MOST_RANK, add, inner, pass_back, product, summing_order

Forward = Callable[..., Any]


def quicken_frozen_layers(model: nn.Module) -> None:
    """Let a model with PEFT's adapters compute its linear layers and norms by our C, where that is possible.

    Adapters keep their float32 factors. Norms keep the bits that they have in the forward pass.
    """
    # here, because the other methods do without PEFT
    from peft.tuners.lora.layer import Linear

    order = summing_order()
    if order is None:
        return
    for module in model.modules():
        if isinstance(module, Linear) and _is_usual(module, order):
            module.forward = AdaptedLinear(module, order, module.forward).forward
        elif not any(parameter.requires_grad for parameter in module.parameters()) and (norm := find_norm(module)):
            module.forward = FrozenNorm(norm).forward


def _is_usual(module: Any, order: Order) -> bool:
    """Whether PEFT's layer is a plain product with one plain adapter, of shapes and formats that our C computes."""
    base = module.base_layer
    if type(base) is not nn.Linear or set(module.lora_A) != {ADAPTER} or module.lora_variant or module.merged:
        return False
    weight, low = base.weight, _adapter(module)
    is_frozen = weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and weight.is_contiguous()
    is_small = low.a_rI.dtype == low.b_Or.dtype == torch.float32 and len(low.a_rI) <= MOST_RANK
    is_plain = module.lora_B[ADAPTER].bias is None and isinstance(module.lora_dropout[ADAPTER], nn.Identity)
    return is_frozen and is_small and is_plain and order.fits((len(weight), weight.shape[1]))


def _adapter(module: Any) -> LowRank:
    return LowRank(module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight, module.scaling[ADAPTER])


def _is_rows(x: torch.Tensor, width: int) -> bool:
    return x.dtype == torch.bfloat16 and x.is_contiguous() and x.shape[-1] == width


@dataclass(eq=False)
class AdaptedLinear:
    """The forward pass of one linear layer of PEFT."""

    module: Any
    order: Order
    otherwise: Forward

    def forward(self, x: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        """What the layer computes; for other calls than with bfloat16 rows by PEFT."""
        base = self.module.base_layer
        if rest or options or not _is_rows(x, base.in_features):
            found: torch.Tensor = self.otherwise(x, *rest, **options)
            return found
        low = _adapter(self.module)
        out_nO: torch.Tensor = _Linear.apply(x.view(-1, x.shape[-1]), low.a_rI, low.b_Or, low.scale, base, self.order)
        return out_nO.view(*x.shape[:-1], -1)


class _Linear(torch.autograd.Function):
    """A product with a frozen matrix, its bias, and an adapter."""

    @staticmethod
    def forward(ctx: Any, x_nI: Any, a_rI: Any, b_Or: Any, scale: float, base: nn.Linear, order: Order) -> Any:
        ctx.save_for_backward(x_nI, a_rI, b_Or)
        ctx.given = scale, base, order
        out_nO = product(order, x_nI, base.weight.t())
        if base.bias is not None:
            out_nO += base.bias
        add(out_nO, inner(x_nI, a_rI), b_Or.t().contiguous(), scale)
        return out_nO

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        x_nI, a_rI, b_Or = ctx.saved_tensors
        scale, base, order = ctx.given
        grad_nO = grads[0].contiguous()
        low = LowRank(a_rI.detach(), b_Or.detach(), scale)
        grad_nI = product(order, grad_nO, base.weight)
        pass_back(low, x_nI, inner(x_nI, low.a_rI), grad_nO, grad_nI)
        return grad_nI, low.a_rI.grad, low.b_Or.grad, None, None, None


@dataclass(eq=False)
class FrozenNorm:
    """The forward pass of one norm."""

    norm: TokenNorm

    def forward(self, hidden_states: torch.Tensor, *rest: Any) -> torch.Tensor:
        """What the norm computes; of anything but bfloat16 rows by torch."""
        if rest or not _is_rows(hidden_states, len(self.norm.module.weight)):
            return self.norm.otherwise(hidden_states, *rest)
        out: torch.Tensor = _Norm.apply(hidden_states, self.norm)
        return out


class _Norm(torch.autograd.Function):
    """A norm with a frozen weight."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, norm: TokenNorm) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.norm = norm
        return norm.normed(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        (x,) = ctx.saved_tensors
        return ctx.norm.passed_back(x, grads[0].contiguous()), None
