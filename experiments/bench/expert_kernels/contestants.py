"""Who computes a layer in the kernel benchmark, and whether the results are right.

Shapes: T tokens, K experts per token, E experts, D model width, F expert width.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers.integrations.moe import batched_mm_experts_forward, grouped_mm_experts_forward

from moe import expertier_experts, grouped_experts

from .shapes import LayerInput

if TYPE_CHECKING:
    from moe.kernels import QuantisedWeight

Compute = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]
WeightsOf = Callable[[nn.Module, int], tuple[Tensor, Tensor]]
# `batched_mm` copies the weights of every routed row; larger copies are left out, as they measure memory only
BATCHED_LIMIT_BYTES = 8 << 30
# a loop over experts takes a second per call or so; once per layer is enough
EAGER_TOKENS = 4096
QUANTISED = ("int8", "int4", "fp8", "fp8_block")
# of bfloat16: three stored roundings of 2**-9 each and sums of such terms; of float32: sums of 14336 terms
BOUNDS = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-4}


def dense_weights(experts: nn.Module, expert: int) -> tuple[Tensor, Tensor]:
    """Both projections of one expert in float32."""
    return experts.gate_up_proj[expert].float(), experts.down_proj[expert].float()


@dataclass(frozen=True)
class Contestant:
    """A way to compute a layer.

    Args:
        name: label in tables and records.
        compute: the signature of a transformers experts implementation.
        trains: whether it has a backward pass.
        weight_bytes: bytes per weight that it reads.
        weights: the float32 projections of an expert that it is meant to compute with.
        can_be_captured: whether its launches can be recorded in a CUDA graph (they cannot if it waits for the device).
    """

    name: str
    compute: Compute
    trains: bool = True
    weight_bytes: float = 2.0
    weights: WeightsOf = dense_weights
    can_be_captured: bool = True


def eager(experts: nn.Module, x_TD: Tensor, expert_TK: Tensor, combine_TK: Tensor) -> Tensor:
    """The loop over experts in the module's own forward."""
    return type(experts).forward.__wrapped__(experts, x_TD, expert_TK, combine_TK)


def liger(experts: nn.Module, x_TD: Tensor, expert_TK: Tensor, combine_TK: Tensor) -> Tensor:
    """Liger's fused MoE."""
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    return LigerFusedMoEFunction.apply(
        x_TD, experts.gate_up_proj, experts.down_proj, expert_TK.to(torch.int32), combine_TK
    )


def dense_contestants(num_rows: int, expert_bytes: float, num_tokens: int) -> list[Contestant]:
    """The dense contestants that suit this number of tokens, ours first.

    Args:
        num_rows: T * K of the call.
        expert_bytes: weights of one expert; `batched_mm` copies them for every row.
        num_tokens: T of the call.
    """
    found = [
        Contestant("expertier", expertier_experts),
        # counting rows by `bincount` waits for the device
        Contestant("torch grouped_mm", grouped_experts, can_be_captured=False),
        Contestant("transformers grouped_mm", grouped_mm_experts_forward),
    ]
    if num_tokens <= 64 and num_rows * expert_bytes <= BATCHED_LIMIT_BYTES:
        found.append(Contestant("transformers batched_mm", batched_mm_experts_forward, trains=False))
    if num_tokens == EAGER_TOKENS:
        found.append(Contestant("transformers eager", eager, can_be_captured=False))
    if importlib.util.find_spec("liger_kernel") is not None and num_tokens >= 64:
        found.append(Contestant("liger fused_moe", liger))
    return found


def quantised_contestant(experts: nn.Module, name: str) -> Contestant:
    """Our kernels on quantised copies of a module's weights."""
    from moe.kernels import ExpertWeights, compute_experts, dequantise, quantise

    up, down = ([quantise(part, name) for part in weight] for weight in _expert_by_expert(experts))
    weights = ExpertWeights(_joined(up), _joined(down))

    def compute(_: nn.Module, x_TD: Tensor, expert_TK: Tensor, combine_TK: Tensor) -> Tensor:
        return compute_experts(x_TD, expert_TK, combine_TK, weights)

    def dequantised(_: nn.Module, expert: int) -> tuple[Tensor, Tensor]:
        return dequantise(_one(weights.up, expert))[0], dequantise(_one(weights.down, expert))[0]

    scale_bytes = 8 / 128 if name == "int4" else 0.0
    weight_bytes = (0.5 if name == "int4" else 1.0) + scale_bytes
    return Contestant(f"expertier {name}", compute, trains=False, weight_bytes=weight_bytes, weights=dequantised)


def _expert_by_expert(experts: nn.Module) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Quantising all experts at once would need their weights in float32."""
    return experts.gate_up_proj.detach().split(1), experts.down_proj.detach().split(1)


def _joined(parts: "list[QuantisedWeight]") -> "QuantisedWeight":
    zero = None if parts[0].zero is None else torch.cat([part.zero for part in parts])
    data, scale = (torch.cat([getattr(part, name) for part in parts]) for name in ("data", "scale"))
    return replace(parts[0], data=data, scale=scale, zero=zero)


def _one(weight: "QuantisedWeight", slot: int) -> "QuantisedWeight":
    here = slice(slot, slot + 1)
    zero = None if weight.zero is None else weight.zero[here]
    return replace(weight, data=weight.data[here], scale=weight.scale[here], zero=zero)


@dataclass(frozen=True, eq=False)
class Truth:
    """Output and gradients in float32, weights' gradients by expert.

    Args:
        y_TD, x_TD, combine_TK: the output, and gradients for a cotangent.
        up, down: gradient by expert, for experts that have rows.
        cotangent_TD: what the gradients belong to.
    """

    y_TD: Tensor
    x_TD: Tensor
    combine_TK: Tensor
    up: dict[int, Tensor]
    down: dict[int, Tensor]
    cotangent_TD: Tensor


def truth(experts: nn.Module, given: LayerInput, weights: WeightsOf = dense_weights) -> Truth:
    """Expert by expert in float32, so that only one expert's weights are ever wide.

    Args:
        experts: the module whose activation, and unless `weights` says otherwise weights, are used.
        given: its input; ids >= E contribute nothing.
        weights: both projections of an expert.

    Returns:
        Output and gradients.
    """
    x_TD, combine_TK = given.x_TD.float(), given.combine_TK.float()
    # a generator of its own: a failed capture of a graph leaves the device's default one unusable
    generator = torch.Generator(x_TD.device).manual_seed(0)
    cotangent_TD = torch.randn(x_TD.shape, generator=generator, device=x_TD.device).to(given.x_TD.dtype).float()
    found = Truth(torch.zeros_like(x_TD), torch.zeros_like(x_TD), torch.zeros_like(combine_TK), {}, {}, cotangent_TD)
    for expert in given.expert_TK.unique().tolist():
        if expert >= experts.num_experts:
            continue
        token_N, slot_N = torch.where(given.expert_TK == expert)
        leaves = [x_TD[token_N], combine_TK[token_N, slot_N], *weights(experts, expert)]
        x, combine, up, down = (leaf.detach().requires_grad_() for leaf in leaves)
        y = combine[:, None] * (experts._apply_gate(x @ up.T) @ down.T)
        grad_x, grad_combine, grad_up, grad_down = torch.autograd.grad(y, (x, combine, up, down), cotangent_TD[token_N])
        found.y_TD.index_add_(0, token_N, y.detach())
        found.x_TD.index_add_(0, token_N, grad_x)
        found.combine_TK[token_N, slot_N] = grad_combine
        found.up[expert], found.down[expert] = grad_up, grad_down
    return found


def worst_error(contestant: Contestant, experts: nn.Module, given: LayerInput, exact: Truth) -> float:
    """The largest relative error: of the output and, if the contestant trains, of any gradient of any expert.

    Memory that a kernel fails to write is NaN while this runs, so such a failure is never small.
    """
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        return _worst_error(contestant, experts, given, exact)
    finally:
        torch.use_deterministic_algorithms(was_deterministic)


def _worst_error(contestant: Contestant, experts: nn.Module, given: LayerInput, exact: Truth) -> float:
    with torch.no_grad():
        y_TD = contestant.compute(experts, given.x_TD, given.expert_TK, given.combine_TK)
    errors = [_relative(y_TD, exact.y_TD)]
    if contestant.trains:
        x_TD, combine_TK = (tensor.detach().requires_grad_() for tensor in (given.x_TD, given.combine_TK))
        y_TD = contestant.compute(experts, x_TD, given.expert_TK, combine_TK)
        leaves = (x_TD, combine_TK, experts.gate_up_proj, experts.down_proj)
        grad_x, grad_combine, grad_up, grad_down = torch.autograd.grad(y_TD, leaves, exact.cotangent_TD.to(y_TD.dtype))
        errors += [
            _relative(y_TD, exact.y_TD),
            _relative(grad_x, exact.x_TD),
            _relative(grad_combine, exact.combine_TK),
        ]
        for found, wanted in ((grad_up, exact.up), (grad_down, exact.down)):
            errors += [_relative(found[expert], gradient) for expert, gradient in wanted.items()]
            idle = [expert for expert in range(experts.num_experts) if expert not in wanted]
            errors.append(float("inf") if idle and bool((found[idle] != 0).any()) else 0.0)
    return float("inf") if any(error != error for error in errors) else max(errors)


def _relative(found: Tensor, wanted: Tensor) -> float:
    return ((found.float() - wanted).norm() / wanted.norm()).item()
