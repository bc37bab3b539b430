"""From the sections of a cluster file to one row per GPU and one per node, and arrays to JSON and back."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from routing.ground.quantity import format_size

from .spec import ClusterSpec, GpuType, NodeGroup, NodeType

Curve = tuple[tuple[int, float], ...]
# one number for all nodes, in plans of before tiers were planned on clusters
OLD_SCALARS = ("dram_bytes_per_s", "ssd_bytes_per_s", "pcie_bytes_per_s")


def gpu_rows(spec: ClusterSpec, group: NodeGroup, kind: NodeType) -> list[dict[str, Any]]:
    """The GPUs of a group of nodes, in rank order.

    Raises:
        ValueError: if a GPU reserves all of its memory.
    """
    between = spec.links.inter_node.bandwidth
    nic = kind.nic.bandwidth * (kind.nic.count or kind.gpus.count) / kind.gpus.count if between == "nic" else between
    rows = []
    for index in range(kind.gpus.count):
        override = group.gpus.get(index)
        named = kind.gpus.type if override is None or override.type is None else override.type
        gpu_type: GpuType = spec.gpu_types[named] if named else next(iter(spec.gpu_types.values()))
        reserve = group.reserve if override is None else override.reserve
        memory = float("inf") if gpu_type.memory is None else gpu_type.memory - reserve
        if memory <= 0:
            raise ValueError(
                f"GPU {index} of {group.type!r} reserves {format_size(reserve)} of {format_size(gpu_type.memory or 0)}"
            )
        rows.append(
            {
                "speed_G": group.speed if override is None else override.speed,
                "memory_bytes_G": memory,
                "hbm_bytes_per_s_G": gpu_type.hbm,
                "flops_G": max(gpu_type.flops.values()) * gpu_type.efficiency,
                "nvlink_bytes_per_s_G": kind.nvlink,
                "nic_bytes_per_s_G": nic,
                "curve": tuple(sorted(gpu_type.expert_seconds.items())),
            }
        )
    return rows * group.count


def node_row(kind: NodeType) -> dict[str, float]:
    """Host memory, SSD, PCIe and processor of one node; 0 where there is none.

    Raises:
        ValueError: if all of a tier is reserved.
    """
    row: dict[str, float] = {}
    for name, store in (("dram", kind.dram), ("ssd", kind.ssd)):
        if store is not None and store.reserve >= store.size:
            raise ValueError(f"{name} reserves {format_size(store.reserve)} of {format_size(store.size)}")
        row[f"{name}_bytes_M"] = 0.0 if store is None else store.size - store.reserve
        row[f"{name}_bytes_per_s_M"] = 0.0 if store is None else store.bandwidth
    row["pcie_bytes_per_s_M"] = kind.pcie
    row["cpu_bytes_per_s_M"] = kind.cpu.bandwidth or row["dram_bytes_per_s_M"]
    row["cpu_flops_M"] = kind.cpu.flops or float("inf")
    return row


def finite(value: Any) -> Any:
    """JSON has no inf: it is written as null."""
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    if value.ndim == 2:
        return value.tolist()
    return [entry if np.isfinite(entry) else None for entry in value.tolist()]


def arrays_from_json(value: dict[str, Any]) -> dict[str, Any]:
    """The entries of a cluster in a plan file that are arrays or numbers."""
    found: dict[str, Any] = {}
    for name, entry in value.items():
        if name == "curves":
            found[name] = tuple(tuple((int(rows), float(seconds)) for rows, seconds in curve) for curve in entry)
        elif name in OLD_SCALARS:
            found[f"{name}_M"] = np.full(len(value["dram_bytes_M"]), float(entry))
        elif name.rpartition("_")[2] in ("G", "M", "GG"):
            found[name] = _array(name, entry)
        else:
            found[name] = float("inf") if entry is None else float(entry)
    return found


def _array(name: str, entry: Any) -> NDArray[Any] | None:
    if entry is None:
        return None
    if name in ("node_G", "rack_M"):
        return np.array(entry, np.int64)
    if name == "rank_cost_GG":
        return np.array(entry, np.float64)
    return np.array([np.inf if number is None else number for number in entry], np.float64)
