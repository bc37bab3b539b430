"""Which decoder layer each row of the routing data is: recorded numbers, else the cluster file's, else the rows' own.

Plans name decoder layers, dense ones counted, because engines do. Numbers that contradict each other are refused.
Shapes: L MoE layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .spec import ModelSpec


@dataclass(frozen=True, kw_only=True)
class LayerNumbers:
    """MoE layers of a problem.

    Args:
        rows: which rows of the data they are.
        layer_ids: their decoder layers, rising.
        hidden_layers: decoder layers in all.
    """

    rows: tuple[int, ...]
    layer_ids: tuple[int, ...]
    hidden_layers: int


def layers_of_trace(
    num_layers: int, recorded: Sequence[int] | None, hidden_layers: int | None, model: ModelSpec
) -> LayerNumbers:
    """Decoder layers of a trace, all of whose layers are MoE layers.

    Args:
        num_layers: MoE layers of the trace, at least 1.
        recorded: the trace's own numbers, or None.
        hidden_layers: decoder layers in all as recorded, or None.
        model: the cluster file's section.

    Raises:
        ValueError: if the numbers contradict the cluster file, or there are none where it says that layers are dense.
    """
    rows = tuple(range(num_layers))
    if recorded is not None:
        return _checked(rows, tuple(recorded), hidden_layers, model)
    _expect_first_layer(num_layers, "layers of the trace", model)
    first = model.first_moe_layer
    return _checked(rows, tuple(range(first, first + num_layers)), None, model)


def layers_of_loads(used: NDArray[np.bool_], recorded: Sequence[int] | None, model: ModelSpec) -> LayerNumbers:
    """MoE layers among the rows of a loads table.

    A row without any load is a dense layer, unless recorded numbers or the cluster file say that it is a MoE layer:
    then it is idle, and keeps its place in the plan.

    Args:
        used: which rows have any load.
        recorded: the file's own `layer_ids`, for all rows, or for the MoE layers among decoder layers; or None.
        model: the cluster file's section.

    Raises:
        ValueError: if the numbers contradict each other or the rows.
    """
    count = len(used)
    if recorded is not None:
        ids = tuple(recorded)
        if len(ids) == count:
            return _checked(tuple(range(count)), ids, None, model)
        _expect_inside(used, ids, "layer_ids")
        return _checked(ids, ids, count, model)
    if count == model.moe_layers:
        return layers_of_trace(count, None, None, model)
    moe = np.flatnonzero(used)
    if not _says_first(model):
        if model.hidden_layers is not None and count < model.hidden_layers:
            _expect_first_layer(count, "rows of loads", model)
        return _checked(tuple(moe.tolist()), tuple(moe.tolist()), count, model)
    return _from_first_layer(used, moe, model)


def _from_first_layer(used: NDArray[np.bool_], moe: NDArray[np.int64], model: ModelSpec) -> LayerNumbers:
    """Rows of a model of which the first MoE layer is known: decoder layers, or MoE layers alone."""
    count, first = len(used), model.first_moe_layer
    if used[:first].any() and count != model.hidden_layers:
        ids = tuple((moe + first).tolist())
        return _checked(tuple(moe.tolist()), ids, model.hidden_layers or first + count, model, is_sparse=True)
    _expect_inside(used, tuple(range(first, count)), f"layers from model.first_moe_layer = {first} on")
    if model.moe_layers is not None and len(moe) < model.moe_layers == count - first:
        moe = np.arange(first, count)
    ids = tuple(moe.tolist())
    return _checked(ids, ids, count, model, is_sparse=True)


def _checked(
    rows: tuple[int, ...], ids: tuple[int, ...], hidden: int | None, model: ModelSpec, *, is_sparse: bool = False
) -> LayerNumbers:
    """The numbers, if they rise, fit into the model, and begin where the cluster file says."""
    if list(ids) != sorted(set(ids)) or (ids and ids[0] < 0):
        raise ValueError(f"layer_ids must rise from 0 or more; got {list(ids)[:12]}")
    last = ids[-1] if ids else -1
    if hidden is not None and model.hidden_layers is not None and hidden != model.hidden_layers:
        raise ValueError(f"the cluster file says model.hidden_layers = {model.hidden_layers}, the data has {hidden}")
    total = model.hidden_layers or hidden or last + 1
    if last >= total:
        raise ValueError(f"the data has MoE layers up to decoder layer {last}; there are only {total} decoder layers")
    if _says_first(model) and ids and not is_sparse and ids[0] != model.first_moe_layer:
        raise ValueError(
            f"the cluster file says model.first_moe_layer = {model.first_moe_layer}, the data begins at layer {ids[0]}"
        )
    return LayerNumbers(rows=rows, layer_ids=ids, hidden_layers=total)


def _says_first(model: ModelSpec) -> bool:
    return "first_moe_layer" in model.model_fields_set


def _expect_first_layer(count: int, what: str, model: ModelSpec) -> None:
    """A model with dense layers needs to say where its MoE layers begin."""
    if not _says_first(model) and model.hidden_layers not in (None, count):
        raise ValueError(
            f"{count} {what} without layer numbers, and the cluster file says model.hidden_layers = "
            f"{model.hidden_layers}; give model.first_moe_layer too, or record layer_ids"
        )


def _expect_inside(used: NDArray[np.bool_], allowed: tuple[int, ...], what: str) -> None:
    if allowed and max(allowed) >= len(used):
        raise ValueError(f"{what} reach layer {max(allowed)}; the loads have {len(used)} rows")
    if outside := sorted(set(np.flatnonzero(used).tolist()) - set(allowed)):
        raise ValueError(f"row {outside[0]} has load, but is not among the {what}")
