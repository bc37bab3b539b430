"""Memory in huge pages: a token reads each weight once, and walks of page tables can cost more than the data."""

import contextlib
import mmap


def huge_mapping(nbytes: int) -> mmap.mmap:
    """Anonymous memory for which the kernel is asked to use huge pages; ordinary memory where it has none to give."""
    mapping = mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # advice only: kernels without huge pages refuse it, and containers may forbid it
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):
            mapping.madvise(mmap.MADV_HUGEPAGE)
    return mapping
