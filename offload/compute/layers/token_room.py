"""Memory for what a decoder layer computes for a token on its way, which is used again.

Shapes: D model width, H heads of queries, W head width, E experts, K experts per token.
"""

from typing import Any, NamedTuple

import torch

from .structs import Choice


class RoomSizes(NamedTuple):
    """What a layer needs.

    Args:
        model_width, heads, head_width: D, H and W.
        experts: E; 0 if no logits of a router are computed.
    """

    model_width: int
    heads: int
    head_width: int
    experts: int


class TokenRoom:
    """Rooms for queries, what they attend to, sums, logits and the choice of experts, and their addresses.

    Args:
        sizes: how large each room is.
        how: how experts are chosen; None if they are not.
    """

    def __init__(self, sizes: RoomSizes, how: Choice | None) -> None:
        def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype)

        # tensors of inference mode could not be used outside of it
        with torch.inference_mode(False):
            self.query_1H1W = empty(1, sizes.heads, 1, sizes.head_width)
            self.attended_1H1W = empty(1, sizes.heads, 1, sizes.head_width)
            self.sum_11D, self.normed_11D = empty(1, 1, sizes.model_width), empty(1, 1, sizes.model_width)
            self.normed_1D = self.normed_11D[0]
            logit_type = torch.float32 if how and how.is_wide else torch.bfloat16
            self.logit_1E, top_k = empty(1, sizes.experts, dtype=logit_type), 0 if how is None else how.chosen
            self.expert_1K = empty(1, top_k, dtype=torch.int64)
            self.weight_1K = empty(1, top_k, dtype=torch.float32 if how and not how.is_rounded else torch.bfloat16)
        self.query, self.attended = self.query_1H1W.data_ptr(), self.attended_1H1W.data_ptr()
        self.sum, self.normed = self.sum_11D.data_ptr(), self.normed_11D.data_ptr()
        self.logits = self.logit_1E.data_ptr() if sizes.experts else None
        self.expert, self.weight = (self.expert_1K.data_ptr(), self.weight_1K.data_ptr()) if top_k else (None, None)


class FreeRooms:
    """Rooms of one size that nobody uses now. Each thread that computes a layer takes one and gives it back.

    Args:
        sizes, how: as for `TokenRoom`.
    """

    def __init__(self, sizes: RoomSizes, how: Choice | None) -> None:
        self._sizes, self._how, self._free = sizes, how, list[TokenRoom]()

    def take(self) -> TokenRoom:
        """A room; a new one if none is free."""
        try:
            return self._free.pop()
        except IndexError:
            return TokenRoom(self._sizes, self._how)

    def give_back(self, room: TokenRoom) -> None:
        """Nobody has a part of it any longer."""
        self._free.append(room)


class TokenRooms:
    """The rooms that all layers of a model share."""

    def __init__(self) -> None:
        self._of: dict[tuple[int, ...], FreeRooms] = {}

    def of(self, sizes: RoomSizes, how: Choice | None) -> FreeRooms:
        """Those for layers of these sizes, which choose so many experts."""
        key = (*sizes, *((0, 0, 0) if how is None else (how.chosen, how.is_rounded, how.is_wide)))
        return self._of.setdefault(key, FreeRooms(sizes, how))

    def __deepcopy__(self, memo: dict[int, Any]) -> "TokenRooms":
        """Copies of a model share them, too."""
        return self
