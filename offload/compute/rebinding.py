"""A module's own forward pass with other helpers: the code of transformers, which looks some names up with us."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import nn


def plain_function(function: Any, names: set[str]) -> FunctionType | None:
    """The function, if it is one whose own code uses one of these global names; None for wrappers and others."""
    is_plain = isinstance(function, FunctionType) and names & set(function.__code__.co_names)
    return function if is_plain else None


def rebound(function: FunctionType, helpers: Mapping[str, Any]) -> FunctionType:
    """The same code with these global names replaced, which nobody else sees."""
    names = {**function.__globals__, **helpers}
    made = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    made.__kwdefaults__ = function.__kwdefaults__
    return made


@dataclass(eq=False)
class ReboundForward:
    """The forward pass of one module; a method, so that a copied model has copies of its own."""

    module: nn.Module
    function: FunctionType
    otherwise: Callable[..., Any]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module computes; compilers and exporters see the module's own code."""
        if torch.compiler.is_compiling():
            return self.otherwise(*args, **kwargs)
        return self.function(self.module, *args, **kwargs)
