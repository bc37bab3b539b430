"""Memory in huge pages: a token reads each weight once, and walks of page tables can cost more than the data."""

import contextlib
import mmap

import torch
from torch import nn

ALIGNMENT_BYTES = 64


def huge_mapping(nbytes: int) -> mmap.mmap:
    """Anonymous memory for which the kernel is asked to use huge pages; ordinary memory where it has none to give."""
    mapping = mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):
            mapping.madvise(mmap.MADV_HUGEPAGE)
    return mapping


def move_to_huge_pages(model: nn.Module) -> None:
    """Move a model's CPU parameters into one such mapping.

    Memory is taken as weights arrive and each old copy is freed, so that little more than one parameter exists twice.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.device.type == "cpu" and parameter.numel()]
    total = sum(_rounded(parameter.nbytes) for parameter in parameters)
    if not total:
        return
    place = torch.frombuffer(huge_mapping(total), dtype=torch.uint8)
    start = 0
    for parameter in parameters:
        moved = place[start : start + parameter.nbytes].view(parameter.dtype).view(parameter.shape)
        parameter.data = moved.copy_(parameter.data)
        start += _rounded(parameter.nbytes)


def _rounded(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
