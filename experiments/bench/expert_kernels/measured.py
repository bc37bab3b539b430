"""One measured case of the kernel benchmark: what is timed, the parity that must hold before, and the row it gives.

Shapes: T tokens, D model width, K experts per token.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from .contestants import BOUNDS, Contestant, truth, worst_error
from .shapes import LayerInput, LayerShape
from .timing import Times


class ParityError(RuntimeError):
    """Something that was to be timed computes something else than it should."""


def call_of(contestant: Contestant, experts: nn.Module, given: LayerInput, is_training: bool) -> Callable[[], Any]:
    """What is timed: the layer alone, or with its backward pass to tokens, combine weights and expert weights."""
    if not is_training:

        def forward() -> Any:
            with torch.no_grad():
                return contestant.compute(experts, given.x_TD, given.expert_TK, given.combine_TK)

        return forward
    x_TD, combine_TK = (tensor.detach().requires_grad_() for tensor in (given.x_TD, given.combine_TK))
    leaves = (x_TD, combine_TK, *experts.parameters())
    cotangent_TD = torch.ones_like(given.x_TD)

    def forward_and_backward() -> Any:
        y_TD = contestant.compute(experts, x_TD, given.expert_TK, combine_TK)
        return torch.autograd.grad(y_TD, leaves, cotangent_TD)

    return forward_and_backward


def require_parity(contestants: Sequence[Contestant], experts: nn.Module, given: LayerInput, what: str) -> None:
    """Refuse to go on when a contestant computes something else than a loop over experts in float32.

    Raises:
        ParityError: if output or a gradient is off by more than the number format explains.
    """
    bound = BOUNDS[given.x_TD.dtype]
    for weights, alike in itertools.groupby(contestants, key=lambda one: one.weights):
        exact = truth(experts, given, weights)
        for one in alike:
            error = worst_error(one, experts, given, exact)
            if not error <= bound:
                raise ParityError(
                    f"parity is red, so no time is printed: {one.name} at {what} is off by {error:.2e} (relative norm) "
                    f"from float32; at most {bound:.0e} is allowed"
                )


def row_of(
    name: str, layer: LayerShape, num_tokens: int, routing: str, is_training: bool, who: str, times: Times
) -> dict[str, Any]:
    """A line of the table: the case, the percentiles and the rate."""
    flops = layer.flops(num_tokens) * (3 if is_training else 1)
    return {
        "shape": name,
        "tokens": num_tokens,
        "routing": routing,
        "pass": "forward+backward" if is_training else "forward",
        "variant": who,
        "p50_us": round(times.median_s * 1e6, 1),
        "p20_us": round(times.p20_s * 1e6, 1),
        "p80_us": round(times.p80_s * 1e6, 1),
        "samples": times.samples,
        "tflops_per_s": round(flops / times.median_s / 1e12, 3),
    }
