"""A feed-forward's forward pass for one token, in layers whose other parts their modules compute."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .held import is_read
from .routed_block import RoutedBlock
from .token_room import FreeRooms, RoomSizes, TokenRooms


class TokenBlock:
    """The forward pass of one feed-forward; a method, so that a copied model has copies of its own.

    Args:
        block: a router with its experts, and perhaps a shared expert.
        prepare: gives what stands for it with the number of threads in use, or None where modules compute.
        rooms: memory that all layers of the model share.
    """

    def __init__(self, block: nn.Module, prepare: Callable[[nn.Module], RoutedBlock | None], rooms: TokenRooms) -> None:
        self._block, self._prepare, self._rooms = block, prepare, rooms
        self._otherwise = block.forward
        self._prepared: dict[int, tuple[RoutedBlock, FreeRooms] | None] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> "TokenBlock":
        """Addresses are those of the original, so a copy prepares its own."""
        copied = memo[id(self)] = TokenBlock.__new__(TokenBlock)
        copied._block, copied._otherwise = copy.deepcopy(self._block, memo), copy.deepcopy(self._otherwise, memo)
        copied._prepare, copied._rooms, copied._prepared = self._prepare, self._rooms, {}
        return copied

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """What the feed-forward computes; anything but one token in memory by its modules."""
        x, prepared = hidden_states, None
        if not (args or kwargs or torch.compiler.is_compiling()) and x.numel() == x.shape[-1] and is_read(x):
            prepared = self.prepared()
        if prepared is None or not prepared[0].is_usable or x.shape[-1] != prepared[0].width:
            return self._otherwise(x, *args, **kwargs)
        routed, rooms = prepared
        x_1D, room, out = x.view(1, -1), rooms.take(), torch.empty_like(x)
        if not routed.choose(x_1D, room):
            out = self._otherwise(x)
        elif routed.has_listeners:
            routed.by_module(x_1D, room, None, out)
        else:
            routed.compute(routed.step(), x_1D, room, None, out)
        rooms.give_back(room)
        return out

    def prepared(self) -> tuple[RoutedBlock, FreeRooms] | None:
        """What stands for the feed-forward with the number of threads in use; tried when it is first asked for."""
        threads = torch.get_num_threads()
        if threads not in self._prepared:
            found = self._prepare(self._block)
            is_alike = found is not None and found.keeps_shape
            sizes = RoomSizes(0, 0, 0, 0 if found is None else found.how.experts)
            self._prepared[threads] = (found, self._rooms.of(sizes, found.how)) if found and is_alike else None
        return self._prepared[threads]
