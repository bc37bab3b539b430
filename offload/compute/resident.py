"""Where a model's resident weights lie: in huge pages, linear layers compressed if that is wanted."""

import torch
from torch import nn

from ..formats.compression import GUARD_BYTES, CompressedShape, can_compress, compress
from ..memory.huge_pages import huge_mapping
from .compressed_weight import CompressedWeight
from .linears import PLAIN_LINEARS

ALIGNMENT_BYTES = 64
NORMAL_OTHERS = 0.025
"""Share of normally distributed weights whose exponent has no code."""


def move_to_huge_pages(model: nn.Module) -> None:
    """Move a model's plain CPU parameters into one such mapping.

    Memory is taken as weights arrive and each old copy is freed, so that little more than one parameter exists twice.
    """
    parameters = [
        parameter
        for parameter in model.parameters()
        if parameter.device.type == "cpu" and parameter.numel() and not isinstance(parameter, CompressedWeight)
    ]
    total = sum(_rounded(parameter.nbytes) for parameter in parameters)
    if not total:
        return
    place = torch.frombuffer(huge_mapping(total), dtype=torch.uint8)
    start = 0
    for parameter in parameters:
        moved = place[start : start + parameter.nbytes].view(parameter.dtype).view(parameter.shape)
        parameter.data = moved.copy_(parameter.data)
        start += _rounded(parameter.nbytes)


def compress_linears(model: nn.Module) -> None:
    """Compress the weights of a model's linear layers, where that saves memory, but for those that embeddings share.

    All lie in one mapping, of which only what is used takes memory, and each plain weight is freed in its turn.
    """
    linears = [linear for linear in _compressible(model) if linear.weight.is_contiguous()]
    total = sum(module.weight.nbytes for module in linears)
    if not total:
        return
    place, start = torch.frombuffer(huge_mapping(total), dtype=torch.uint8), 0
    for module in linears:
        compressed = _compressed(module.weight.data, place[start:])
        if compressed is not None:
            module.weight = nn.Parameter(compressed, requires_grad=False)
            start += _rounded(compressed.compressed.numel())


def weight_bytes(model: nn.Module) -> int:
    """Memory of a model's parameters and buffers."""
    tensors = (*model.parameters(), *model.buffers())
    return sum(
        tensor.compressed.nbytes if isinstance(tensor, CompressedWeight) else tensor.nbytes for tensor in tensors
    )


def embedding_bytes(model: nn.Module) -> int:
    """Memory of the embeddings of which a token reads a row only; not of those that linear layers share."""
    linears = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    embeddings = {id(module.weight): module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    return sum(weight.nbytes for key, weight in embeddings.items() if key not in linears)


def expected_saving(model: nn.Module) -> int:
    """What `compress_linears` will save, if weights are distributed normally; for models without weights."""
    weights = [linear.weight for linear in _compressible(model)]
    least = sum(CompressedShape(*weight.shape).others_at for weight in weights)
    others = int(NORMAL_OTHERS * sum(weight.numel() for weight in weights))
    return sum(weight.nbytes for weight in weights) - least - others


def expansion_bytes(model: nn.Module) -> int:
    """What the largest linear layer that can be compressed takes while several tokens pass through it."""
    return max((linear.weight.nbytes for linear in _compressible(model)), default=0)


def _compressible(model: nn.Module) -> list[nn.Linear]:
    """The linear layers whose weights can be compressed and are no embedding's."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return [
        module
        for module in model.modules()
        if type(module) in PLAIN_LINEARS
        and id(module.weight) not in embeddings
        and can_compress(tuple(module.weight.shape), module.weight.dtype)
    ]


def _compressed(weight_FD: torch.Tensor, place: torch.Tensor) -> CompressedWeight | None:
    """The weight compressed, at the beginning of `place`; None if that saves nothing."""
    whole, others = compress(weight_FD)
    nbytes = len(whole) + len(others) + GUARD_BYTES
    if nbytes > weight_FD.nbytes - ALIGNMENT_BYTES:
        return None
    place[: len(whole)] = whole
    place[len(whole) : len(whole) + len(others)] = others
    return CompressedWeight(place[:nbytes], weight_FD.shape)


def _rounded(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
