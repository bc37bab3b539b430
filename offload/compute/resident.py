"""Where a model's resident weights lie: in huge pages, linear layers in a stored form if that is wanted."""

from collections.abc import Collection
from typing import Any

from torch import nn

from ..formats.form import MatrixEncoder
from ..formats.resident.linears import PLAIN_LINEARS, aligned, hold, room_of
from ..formats.resident.stored_weight import StoredWeight, stored_bytes


def move_to_huge_pages(model: nn.Module, streamed: Collection[str] = ()) -> None:
    """Move a model's plain CPU parameters into one such mapping.

    Memory is taken as weights arrive and each old copy is freed, so that one parameter exists twice at a time. Tables
    of which a token reads a row stay where they are: they gain nothing.

    Args:
        model: in memory, but for what is streamed.
        streamed: full names of parameters that hold no memory.
    """
    parameters = _movable(model, streamed)
    total = sum(aligned(parameter.nbytes) for parameter in parameters)
    if not total:
        return
    place, start = room_of(total), 0
    for parameter in parameters:
        moved = place[start : start + parameter.nbytes].view(parameter.dtype).view(parameter.shape)
        parameter.data = moved.copy_(parameter.data)
        start += aligned(parameter.nbytes)


def moved_twice_bytes(model: nn.Module, streamed: Collection[str] = ()) -> int:
    """What `move_to_huge_pages` takes for a moment: the largest parameter that it moves."""
    return max((parameter.nbytes for parameter in _movable(model, streamed)), default=0)


def _movable(model: nn.Module, streamed: Collection[str]) -> list[nn.Parameter]:
    linears = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)} - linears
    return [
        parameter
        for name, parameter in model.named_parameters()
        if name not in streamed
        and parameter.device.type in ("cpu", "meta")
        and parameter.numel()
        and id(parameter) not in tables
        and not isinstance(parameter, StoredWeight)
    ]


def store_linears(model: nn.Module, form: MatrixEncoder, streamed: Collection[str] = ()) -> None:
    """Hold a model's linear layers in a stored form where that saves memory, but for those that embeddings share.

    All lie in one mapping, of which only what is used takes memory, and each plain weight is freed in its turn.

    Args:
        model: in memory, but for what is streamed.
        form: to hold them in.
        streamed: full names of parameters that hold no memory.
    """
    linears = [linear for linear in _storable(model, form, streamed) if linear.weight.is_contiguous()]
    total = sum(aligned(module.weight.nbytes) for module in linears)
    if not total:
        return
    place, start = room_of(total), 0
    for module in linears:
        if (encoded := form.encode(module.weight.data)) is None:
            continue
        stored = place[start : start + len(encoded)].copy_(encoded)
        hold(module, stored, form)
        start += aligned(len(encoded))


def weight_bytes(model: nn.Module) -> int:
    """Memory of a model's parameters and buffers."""
    return sum(stored_bytes(tensor).nbytes for tensor in (*model.parameters(), *model.buffers()))


def embedding_bytes(model: nn.Module) -> int:
    """Memory of the embeddings of which a token reads a row only; not of those that linear layers share."""
    linears = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    embeddings = {id(module.weight): module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    return sum(weight.nbytes for key, weight in embeddings.items() if key not in linears)


def expected_saving(model: nn.Module, form: MatrixEncoder, streamed: Collection[str] = ()) -> int:
    """What `store_linears` will save, if weights are distributed normally; for models without weights."""
    weights = [linear.weight for linear in _storable(model, form, streamed)]
    return sum(weight.nbytes - form.expected_bytes((weight.shape[0], weight.shape[1])) for weight in weights)


def expansion_bytes(model: Any, form: MatrixEncoder | None) -> tuple[int, int]:
    """What the largest stored linear layer takes that is expanded while several tokens pass through it, and the head.

    Args:
        model: in memory, or its skeleton.
        form: that other linear layers are held in, or will be.
    """
    stored = {id(linear): linear for linear in model.modules() if isinstance(linear, nn.Linear) and _is_stored(linear)}
    stored |= {} if form is None else {id(linear): linear for linear in _storable(model, form)}
    head = stored.pop(id(model.get_output_embeddings()), None)
    largest = max((linear.weight.nbytes for linear in stored.values()), default=0)
    return largest, 0 if head is None else head.weight.nbytes


def _storable(model: nn.Module, form: MatrixEncoder, streamed: Collection[str] = ()) -> list[nn.Linear]:
    """The linear layers in memory whose weights the form accepts and are no embedding's."""
    left = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    left |= {id(parameter) for name, parameter in model.named_parameters() if name in streamed}
    return [
        module
        for module in model.modules()
        if type(module) in PLAIN_LINEARS
        and id(module.weight) not in left
        and not _is_stored(module)
        and form.accepts(tuple(module.weight.shape), module.weight.dtype)
    ]


def _is_stored(linear: nn.Linear) -> bool:
    return isinstance(linear.weight, StoredWeight)
