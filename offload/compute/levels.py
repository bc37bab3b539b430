"""Levels of exactness: what is promised of a model's bits, and the highest that is not slower than the resident model.

exact   logits are bit-identical to those of transformers' own implementation on this machine
fixed   logits are bit-identical at every budget, in every order of arrival, at every number of threads, and for a
        sequence whatever is computed beside it
fast    logits are close; nothing else is promised
"""

from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

import torch
from torch import nn

from ..checkpoint.experts import ExpertLayer
from .matvec import Matvecs
from .orders import Shape

PROMISES: Mapping[str, str] = {
    "exact": "the bits of transformers' own implementation",
    "fixed": "the same bits at every budget, batch and number of threads",
    "fast": "no promise beyond closeness",
}


def best_arithmetic(model: nn.Module, layers: Iterable[ExpertLayer]) -> str:
    """`exact`, unless torch would have to compute a large product, which is slower than ours: then `fixed`.

    Args:
        model: its resident linear layers are looked at.
        layers: shapes of the experts' matrices.
    """
    shapes = _bfloat16_shapes(model, layers)
    exact = Matvecs("exact")
    if not exact.accepts(1) or all(exact.has_order(shape) for shape in shapes):
        return "exact"
    return "fixed"


def multiplied_shapes(arithmetic: str) -> Callable[[Shape], bool]:
    """Whether our C multiplies single tokens with a matrix of a shape: all of them, but where `exact` was asked for.

    Args:
        arithmetic: the level that was asked for. `auto` is `exact` only where no large shape is left to torch.
    """
    exact = Matvecs("exact")
    if not exact.accepts(1):
        return lambda shape: False
    return cache(exact.has_order) if arithmetic == "exact" else lambda shape: True


def described(matvecs: Matvecs) -> dict[str, Any]:
    """What is promised, and what computes each shape met so far, for the report."""
    return {"level": matvecs.arithmetic, "promise": PROMISES[matvecs.arithmetic], "computed_by": matvecs.names}


def _bfloat16_shapes(model: nn.Module, layers: Iterable[ExpertLayer]) -> set[Shape]:
    """Of every matrix that a token is multiplied with; other types are torch's at every level."""
    linears = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    shapes = {(weight.shape[0], weight.shape[1]) for weight in linears if weight.dtype == torch.bfloat16}
    for layer in layers:
        for parameter in layer.parameters:
            if parameter.dtype == torch.bfloat16 and len(parameter.shape) == 2:
                shapes.add((parameter.shape[0], parameter.shape[1]))
    return shapes
