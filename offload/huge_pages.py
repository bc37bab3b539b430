"""Resident weights in huge pages: a token reads each once, and page-table walks can cost more than the data."""

import mmap

import torch
from torch import nn

ALIGNMENT_BYTES = 64


def move_to_huge_pages(model: nn.Module) -> None:
    """Move a model's CPU parameters into one mapping for which the kernel is asked to use huge pages.

    Memory is taken as weights arrive and each old copy is freed, so that little more than one parameter exists twice.
    Where the system has no huge pages to give, the weights are in ordinary ones, as before.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.device.type == "cpu" and parameter.numel()]
    total = sum(_rounded(parameter.nbytes) for parameter in parameters)
    if not total or not hasattr(mmap, "MADV_HUGEPAGE"):
        return
    mapping = mmap.mmap(-1, total, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    mapping.madvise(mmap.MADV_HUGEPAGE)
    place = torch.frombuffer(mapping, dtype=torch.uint8)
    start = 0
    for parameter in parameters:
        moved = place[start : start + parameter.nbytes].view(parameter.dtype).view(parameter.shape)
        parameter.data = moved.copy_(parameter.data)
        start += _rounded(parameter.nbytes)


def _rounded(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
