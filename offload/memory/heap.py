"""Freed arrays go back to the system: what the allocator keeps for itself is in no budget. Without torch."""

import ctypes
import os

MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of malloc.h
LARGE_BYTES = 4 << 20
"""Blocks from this size on are mapped and given back one by one. glibc would raise the bound to 32 MiB by itself and
keep what lies below: 1,123 MiB were the peak of a prompt of 2,048 tokens, and 918 with this bound. Larger: more is
kept. Smaller: each array of a decoded token costs page faults."""
TUNING_BYTES = 128 << 10
"""The same while a model is fine-tuned, glibc's own first bound. Activations of some 1 MiB come and go in the threads
of several passes and lie between those that are kept: with the bound above, 1.6 GB of a budget of 4 GiB were free and
held by the allocator. Larger: more is held. Smaller: page faults for what one expert computes."""


def return_large_blocks(least_bytes: int = LARGE_BYTES) -> None:
    """Let glibc give back large blocks as soon as they are free; nothing with other allocators, or if a user chose.

    Args:
        least_bytes: of such a block.
    """
    if "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return
    choose = getattr(ctypes.CDLL(None), "mallopt", None)
    if choose is not None:
        choose(MMAP_THRESHOLD, least_bytes)


def return_free_blocks() -> None:
    """Give back what is free now, below the bound as well; nothing with other allocators.

    While a model is loaded, tables of its tensors and the first copies of its small weights come and go: 350 MB stayed
    behind, of 70,000 tensors and 420 MB of weights.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
