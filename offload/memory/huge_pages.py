"""Memory in huge pages: a token reads each weight once, and walks of page tables can cost more than the data."""

import contextlib
import mmap


def huge_mapping(nbytes: int) -> mmap.mmap:
    """Anonymous memory for which the kernel is asked to use huge pages; ordinary memory where it has none to give."""
    mapping = mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    huge_pages(mapping, 0, nbytes)
    return mapping


def huge_pages(mapping: mmap.mmap, start: int, nbytes: int) -> None:
    """Ask for huge pages in a part of a mapping, from a page on."""
    _advise(mapping, "MADV_HUGEPAGE", start, nbytes)


def small_pages(mapping: mmap.mmap, start: int, nbytes: int) -> None:
    """Ask for ordinary pages in a part of a mapping, from a page on."""
    _advise(mapping, "MADV_NOHUGEPAGE", start, nbytes)


def _advise(mapping: mmap.mmap, name: str, start: int, nbytes: int) -> None:
    # advice only: kernels without huge pages refuse it, and containers may forbid it
    if hasattr(mmap, name):
        with contextlib.suppress(OSError):
            mapping.madvise(getattr(mmap, name), start, nbytes)
