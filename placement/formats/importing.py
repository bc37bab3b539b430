"""Plans from the maps of engines, so that what runs now can be scored, compared and migrated from."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from routing.ground.expect import expect_name

from ..contract.cluster import Cluster
from ..contract.layer_numbers import layers_of_trace
from ..contract.plan import Plan
from .hygon import read_hygon
from .lplb import read_lplb

# each gives the experts in the slots of each layer, and the number of GPUs if the file says it
READERS: dict[str, Callable[[Path], tuple[list[list[int]], int | None]]] = {"hygon": read_hygon, "lplb": read_lplb}


def import_plan(path: Path, format_name: str, cluster: Cluster) -> Plan:
    """The plan that a file of an engine means on a cluster.

    Args:
        path: the engine's map; GPU g owns the g-th part of each row.
        format_name: a key of READERS.
        cluster: the machines; `model` numbers the layers.

    Raises:
        ValueError: if the format is unknown, the file damaged, or made for another number of GPUs.
    """
    rows, gpus = READERS[expect_name(format_name, READERS, "format that is read")](path)
    if gpus not in (None, cluster.num_gpus) or len(rows[0]) % cluster.num_gpus:
        made_for = f"for {gpus} GPUs" if gpus else f"of {len(rows[0])} slots"
        raise ValueError(f"{path}: a map {made_for} does not fit the {cluster.num_gpus} GPUs of the cluster file")
    numbers = layers_of_trace(len(rows), None, None, cluster.model)
    return Plan(
        physical_to_logical_LP=np.array(rows, np.int64),
        num_experts=max(map(max, rows)) + 1,
        cluster=cluster,
        layer_ids=numbers.layer_ids,
        hidden_layers=numbers.hidden_layers,
        dispatch="quota" if format_name == "lplb" else cluster.ep.dispatch,
        solver=f"imported from {format_name}",
    )
