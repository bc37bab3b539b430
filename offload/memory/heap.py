"""Freed arrays go back to the system: what the allocator keeps for itself is in no budget. Without torch."""

import ctypes
import os

from .budget import resident_bytes

MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of malloc.h
LARGE_BYTES = 4 << 20
"""Blocks from this size on are mapped and given back one by one. glibc would raise the bound to 32 MiB by itself and
keep what lies below: 1,123 MiB were the peak of a prompt of 2,048 tokens, and 918 with this bound. Larger: more is
kept. Smaller: each array of a decoded token costs page faults."""
ARENA_MAX, TRIM_THRESHOLD = -8, -1  # M_ARENA_MAX and M_TRIM_THRESHOLD of malloc.h
REUSED_BYTES = 32 << 20
"""While a model is fine-tuned, smaller blocks are used again instead of given back; glibc maps larger ones whatever it
is told. Each array of some hundred rows would cost page faults otherwise: 12 M of them, 27 of 62 seconds of processor,
in a step of 1,024 tokens through 768 experts."""


PRODUCT_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
"""Environment variables of how many products oneDNN keeps compiled, and how many torch keeps beside it; each 1,024."""
KEPT_PRODUCTS = 16
"""Every number of rows is a product of its own for every shape of weights, and takes about a megabyte: prompts of 400
lengths through four shapes left 1.5 GB that no budget counts, 165 MB with a bound of 32, and 72 MB with this one, which
is within the slack of every budget. A pass of a usual decoder has some eight shapes."""


def keep_few_products() -> None:
    """Bound the compiled products of torch on a CPU, unless a user chose; nothing once it has multiplied."""
    for name in PRODUCT_CACHES:
        os.environ.setdefault(name, str(KEPT_PRODUCTS))


def return_large_blocks() -> None:
    """Let glibc give back large blocks as soon as they are free; nothing with other allocators, or if a user chose."""
    if "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return
    choose = getattr(ctypes.CDLL(None), "mallopt", None)
    if choose is not None:
        choose(MMAP_THRESHOLD, LARGE_BYTES)


def reuse_blocks() -> None:
    """Let glibc keep freed blocks for all threads together until `KeptBlocks.trim`; nothing with others.

    Several passes run in threads of their own, one at a time. With an arena for each, what one has freed none of the
    others could use: 1.6 GB of a budget of 4 GiB.
    """
    choose = getattr(ctypes.CDLL(None), "mallopt", None)
    if choose is None or "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return
    choose(ARENA_MAX, 1)
    choose(MMAP_THRESHOLD, REUSED_BYTES)
    choose(TRIM_THRESHOLD, (1 << 31) - 1)


class KeptBlocks:
    """Freed blocks that are used again as long as the process has room for them.

    Args:
        used_bytes: what the process is expected to use at most.
        gap_bytes: what its limit has beyond that, for freed blocks.
    """

    def __init__(self, used_bytes: float, gap_bytes: int) -> None:
        self._used_bytes, self._gap_bytes = used_bytes, gap_bytes
        self._beyond_bytes = used_bytes

    def trim(self) -> None:
        """Give back what is free if the process has grown.

        What stays is in use. So nothing is given back again before a quarter of the gap has come on top of it, and at
        the latest when half of the gap is left. To trim whenever the process has more than expected would cost 230,000
        page faults in a step that gave back the same 40 MB at each of 24 layers.
        """
        if return_free_blocks_beyond(self._beyond_bytes):
            soon = max(self._used_bytes, resident_bytes() + self._gap_bytes / 4)
            self._beyond_bytes = min(soon, self._used_bytes + self._gap_bytes / 2)


def return_free_blocks_beyond(limit_bytes: float) -> bool:
    """Give back what is free if the process has more memory than that; whether it had."""
    is_beyond = resident_bytes() > limit_bytes
    if is_beyond:
        return_free_blocks()
    return is_beyond


def return_free_blocks() -> None:
    """Give back what is free now, below the bound as well; nothing with other allocators.

    While a model is loaded, tables of its tensors and the first copies of its small weights come and go: 350 MB stayed
    behind, of 70,000 tensors and 420 MB of weights.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
