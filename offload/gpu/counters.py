"""What the GPU tier did: hits, copies, what the CPU computed."""

from dataclasses import dataclass, field
from typing import Any

from .lanes import Copy
from .split import Rate

MANY_COPIES = 256
"""Copies whose events are kept before they are asked for their time. It bounds memory and keeps queries of the driver
off most calls; a call makes at most K copies while decoding. Not tuned."""


@dataclass
class GpuCounters:
    """Counts since loading or `reset`; a hit is an expert that was on the GPU when its layer asked for it."""

    hits: int = 0
    misses: int = 0
    copied_bytes: int = 0
    copied_s: float = 0.0
    peer_hits: int = 0
    """Misses that lay in another GPU's memory."""
    ahead: int = 0
    """Experts whose copy was queued before their layer was asked."""
    cpu_experts: int = 0
    cpu_s: float = 0.0
    ids_wait_s: float = 0.0
    """Seconds that the host waited to learn which experts are needed."""
    copies: list[Copy] = field(default_factory=list)
    """Copies whose time is not known yet."""

    def harvest(self, wire: Rate | None = None) -> None:
        """Take the times of the copies that are over."""
        left = []
        for copy in self.copies:
            if not copy.is_done:
                left.append(copy)
                continue
            seconds = copy.seconds
            self.copied_bytes += copy.nbytes
            self.copied_s += seconds
            if wire is not None:
                wire.note(copy.nbytes, seconds)
        self.copies = left

    def harvest_many(self) -> None:
        """`harvest`, once more than MANY_COPIES wait."""
        if len(self.copies) > MANY_COPIES:
            self.harvest()

    def reset(self) -> None:
        self.hits = self.misses = self.copied_bytes = self.peer_hits = self.ahead = self.cpu_experts = 0
        self.copied_s = self.cpu_s = self.ids_wait_s = 0.0
        self.copies.clear()

    def summary(self) -> dict[str, Any]:
        """JSON-serialisable; `copied_s` is the floor that the bus sets: no schedule of the same copies is quicker."""
        self.harvest()
        return {
            "hits": self.hits,
            "misses": self.misses,
            "hit_rate": self.hits / max(self.hits + self.misses, 1),
            "copied_bytes": self.copied_bytes,
            "copied_s": self.copied_s,
            "copied_bytes_per_s": self.copied_bytes / self.copied_s if self.copied_s else None,
            "peer_hits": self.peer_hits,
            "copied_ahead": self.ahead,
            "cpu_experts": self.cpu_experts,
            "cpu_s": self.cpu_s,
            "ids_wait_s": self.ids_wait_s,
        }
