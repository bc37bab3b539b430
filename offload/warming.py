"""What to do while experts are on their way: bring the weights that come next into the processor's cache."""

from collections.abc import Callable, Iterator

import torch
from torch import nn

from .layout import experts_modules

PIECE_BYTES = 1 << 20


class Warmer:
    """The resident linear layers between each experts module and the next, in the order of the model.

    Args:
        model: the model, with its weights where they will stay.
        touch: reads so many bytes at an address.
    """

    def __init__(self, model: nn.Module, touch: Callable[[int, int], None]) -> None:
        self._touch = touch
        self._weights_L = _weights_after_experts(model)

    def pieces(self, layer: int) -> Iterator[int]:
        """Each step reads a piece of what comes after this layer's experts, and gives its size in bytes."""
        for weight in self._weights_L[layer]:
            start, stop = weight.data_ptr(), weight.data_ptr() + weight.nbytes
            for address in range(start, stop, PIECE_BYTES):
                size = min(PIECE_BYTES, stop - address)
                self._touch(address, size)
                yield size


def _weights_after_experts(model: nn.Module) -> list[list[torch.Tensor]]:
    """After the last layer comes what is before the first, for the next token."""
    experts = set(experts_modules(model).values())
    groups: list[list[torch.Tensor]] = [[]]
    for module in model.modules():
        if module in experts:
            groups.append([])
        elif type(module) is nn.Linear:
            groups[-1].append(module.weight)
    before_the_first, *after = groups
    if after:
        after[-1].extend(before_the_first)
    return after
