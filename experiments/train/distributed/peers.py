"""The processes that torchrun started, as a run of fine-tuning knows them."""

from typing import Any

from torch import distributed

from .run import join_group


class GroupPeers:
    """All processes of the group, which is joined here."""

    def __init__(self) -> None:
        join_group()
        self.number, self.count = distributed.get_rank(), distributed.get_world_size()

    def gather(self, value: Any) -> list[Any]:
        """What each process gave, in the order of their numbers; all call this together."""
        found: list[Any] = [None] * self.count
        distributed.all_gather_object(found, value)
        return found
