"""Progress of a prompt on its way through a model."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..checkpoint.experts import experts_modules


class Prefill:
    """Says how far the prompt is, token by token and layer by layer, until `close`.

    Args:
        model: a model from `load`; its modules get hooks, which `close` removes.
        num_tokens: tokens of the prompt, for the line.
        say: receives the line.
    """

    def __init__(self, model: Any, num_tokens: int, say: Callable[[str], None]) -> None:
        self._say, self._num_tokens = say, num_tokens
        self._done = self._coming = self._layers = 0
        self._modules = list(experts_modules(model).values())
        self._hooks = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            *(module.register_forward_hook(self._pass_layer) for module in self._modules),
        ]
        self._tell()

    def close(self) -> None:
        """The prompt is done."""
        while self._hooks:
            self._hooks.pop().remove()

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A piece of the prompt comes; long prompts may come in several."""
        tokens = kwargs.get("input_ids", args[0] if args else None)
        self._done += self._coming
        self._coming = tokens.shape[-1] if isinstance(tokens, torch.Tensor) else 0
        self._layers = 0

    def _pass_layer(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._layers += 1
        self._tell()

    def _tell(self) -> None:
        layer = min(self._layers, len(self._modules))
        self._say(f"prefill: {self._done} of {self._num_tokens} tokens done, layer {layer} of {len(self._modules)}")
