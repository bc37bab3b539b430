"""Experts on several processes: how a model is split, how tokens reach their experts, and what that moves.

Everything here stands on `torch.distributed`, FSDP2 and the expert parallelism of transformers; a process group is the
caller's to start.
"""

from .dispatch import DISPATCHES, dispatch
from .gradients import average_gradients, clip_gradients
from .layout import Layout
from .shard import Split, expect_splittable, split
from .traffic import Traffic

__all__ = [
    "DISPATCHES",
    "Layout",
    "Split",
    "Traffic",
    "average_gradients",
    "clip_gradients",
    "dispatch",
    "expect_splittable",
    "split",
]
