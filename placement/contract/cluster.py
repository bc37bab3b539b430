"""Cluster: the machines as arrays, one entry per GPU (G, in rank order, node-major) or per node (M)."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import yaml
from numpy.typing import NDArray
from pydantic import ValidationError

from .cluster_rows import Curve, arrays_from_json, finite, gpu_rows, node_row
from .spec import ClusterSpec, ExpertParallel, ModelSpec
from .tier_spec import Tiers

Float = NDArray[np.float64]
Integer = NDArray[np.int64]
# bounds for files from outside, ten times what clusters have
MAX_SPEC_BYTES = 64 << 20
MAX_GPUS = 1_000_000
Dispatch = Literal["uniform", "nearest", "quota"]
MACHINE_ARRAYS = (
    *("rack_M", "dram_bytes_M", "ssd_bytes_M", "dram_bytes_per_s_M", "ssd_bytes_per_s_M", "pcie_bytes_per_s_M"),
    *("cpu_bytes_per_s_M", "cpu_flops_M"),
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Cluster:
    """GPUs in rank order and what joins them; bandwidths are one direction, bytes per second, per GPU.

    Args:
        node_G: node of each GPU, 0..M-1, not decreasing.
        rack_M: rack of each node.
        speed_G: relative speed; a GPU of speed 0.9 should carry 0.9 of the mean load.
        memory_bytes_G: memory for experts, after what is reserved; inf where it is not known.
        hbm_bytes_per_s_G, flops_G, nvlink_bytes_per_s_G, nic_bytes_per_s_G: rates; `nic` is the GPU's share.
        node_latency_s, rack_latency_s: extra time of a message that leaves the node, the rack.
        rack_bytes_per_s: a GPU's share of the bandwidth between racks; inf if racks do not matter.
        dram_bytes_M, ssd_bytes_M, dram_bytes_per_s_M, ssd_bytes_per_s_M: lower tiers after what is reserved, 0 if
            there are none.
        pcie_bytes_per_s_M: copies from host memory to one GPU of the node; 0 if nothing is copied.
        cpu_bytes_per_s_M, cpu_flops_M: weights that the node's CPUs read in products per second, and arithmetic.
        curves: of each GPU, measured seconds of one expert by its rows, rising; () where the rates count. Empty means
            that no GPU has a curve.
        rank_cost_GG: relative cost per byte between GPUs, or None.
        model, ep, tiers: the sections of the cluster file that are not hardware.
    """

    node_G: Integer
    rack_M: Integer
    speed_G: Float
    memory_bytes_G: Float
    hbm_bytes_per_s_G: Float
    flops_G: Float
    nvlink_bytes_per_s_G: Float
    nic_bytes_per_s_G: Float
    node_latency_s: float = 5e-6
    rack_latency_s: float = 0.0
    rack_bytes_per_s: float = float("inf")
    dram_bytes_M: Float
    ssd_bytes_M: Float
    dram_bytes_per_s_M: Float
    ssd_bytes_per_s_M: Float
    pcie_bytes_per_s_M: Float
    cpu_bytes_per_s_M: Float = field(default_factory=lambda: np.zeros(0))
    cpu_flops_M: Float = field(default_factory=lambda: np.zeros(0))
    curves: tuple[Curve, ...] = ()
    rank_cost_GG: Float | None = None
    model: ModelSpec = field(default_factory=ModelSpec)
    ep: ExpertParallel = field(default_factory=ExpertParallel)
    tiers: Tiers = field(default_factory=Tiers)

    def __post_init__(self) -> None:
        G = len(self.node_G)
        if G == 0 or self.node_G[0] != 0 or np.any((steps := np.diff(self.node_G)) < 0) or np.any(steps > 1):
            raise ValueError(f"node_G must start at 0 and number nodes in rank order; got {self.node_G[:16].tolist()}")
        for name in ("speed_G", "memory_bytes_G", "hbm_bytes_per_s_G", "flops_G", "nvlink_bytes_per_s_G"):
            if len(getattr(self, name)) != G:
                raise ValueError(f"{name} must have one entry per GPU ({G}); got {len(getattr(self, name))}")
        if not np.all(self.speed_G > 0):
            raise ValueError(f"speed_G must be positive; got {self.speed_G.min()}")
        if not len(self.cpu_bytes_per_s_M):  # plans of before: the processor keeps up with its memory
            object.__setattr__(self, "cpu_bytes_per_s_M", self.dram_bytes_per_s_M)
            object.__setattr__(self, "cpu_flops_M", np.full(self.num_nodes, np.inf))
        for name in MACHINE_ARRAYS:
            if len(getattr(self, name)) != self.num_nodes:
                raise ValueError(f"{name} must have one entry per node ({self.num_nodes})")
        if len(self.curves) not in (0, G):
            raise ValueError(f"curves must be one per GPU ({G}); got {len(self.curves)}")
        if self.rank_cost_GG is not None and self.rank_cost_GG.shape != (G, G):
            raise ValueError(f"rank_cost_matrix must be {G} x {G}; got {self.rank_cost_GG.shape}")

    @property
    def num_gpus(self) -> int:
        """G, over all nodes."""
        return len(self.node_G)

    @property
    def num_nodes(self) -> int:
        """M; a node counts if at least one of its GPUs is used."""
        return int(self.node_G[-1]) + 1

    @property
    def gpus_per_node(self) -> int | None:
        """GPUs of each node, or None if nodes differ."""
        counts = np.bincount(self.node_G)
        return int(counts[0]) if np.all(counts == counts[0]) else None

    @property
    def has_lower_tiers(self) -> bool:
        """Whether experts may live where they are not computed: host memory, an SSD, a GPU that only lends memory."""
        stores = self.dram_bytes_M.any() or self.ssd_bytes_M.any()
        return self.tiers.peers is not None or (self.tiers.gpu == "optional" and bool(stores))

    @property
    def computes_G(self) -> NDArray[np.bool_]:
        """Which GPUs compute: all of them, or the first of each node where the others are peers that lend memory."""
        is_first_G = np.append(True, np.diff(self.node_G) > 0)
        return is_first_G if self.tiers.peers else np.ones(self.num_gpus, bool)

    @property
    def node_link_ratio(self) -> float:
        """How many times a byte between nodes costs what it costs inside one; 1 on a single node."""
        if self.num_nodes == 1:
            return 1.0
        return max(1.0, float(np.median(self.nvlink_bytes_per_s_G / self.nic_bytes_per_s_G)))

    @classmethod
    def grid(cls, nodes: int = 1, gpus_per_node: int = 8, **settings: Any) -> Self:
        """A cluster of equal nodes without a file: `Cluster.grid(2, 4)`.

        Args:
            nodes: how many equal nodes, 1 or more.
            gpus_per_node: GPUs of each node, 1 or more.
            settings: keys of the `ep` section of a cluster file, and `model` as a mapping.
        """
        model = settings.pop("model", {})
        spec = {
            "model": model,
            "node_types": {"node": {"gpus": {"count": gpus_per_node}}},
            "nodes": [{"type": "node", "count": nodes}],
            "ep": settings,
        }
        return cls.from_mapping(spec, "Cluster.grid")

    @classmethod
    def from_mapping(cls, value: Any, source: str = "cluster") -> Self:
        """Check a mapping against the schema of cluster files and build the arrays.

        Raises:
            ValueError: one line for each key that is unknown, missing or out of range.
        """
        try:
            spec = ClusterSpec.model_validate(value)
        except ValidationError as error:
            raise ValueError(f"{source}: {_explain(error)}") from error
        try:
            return cls._from_spec(spec)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error

    @classmethod
    def _from_spec(cls, spec: ClusterSpec) -> Self:
        groups = [(group, spec.node_types[group.type]) for group in spec.nodes]
        total = sum(group.count * kind.gpus.count for group, kind in groups)
        size = spec.ep.size or total
        if total > MAX_GPUS:
            raise ValueError(f"{total} GPUs; at most {MAX_GPUS} are supported")
        if size > total:
            raise ValueError(f"ep.size is {size} but the nodes have only {total} GPUs; use at most {total}")
        rows = [row for group, kind in groups for row in gpu_rows(spec, group, kind)]
        curves = tuple(row["curve"] for row in rows)[:size]
        columns = {
            name: np.array([row[name] for row in rows[:size]], np.float64) for name in rows[0] if name != "curve"
        }
        node_G = np.repeat(
            np.arange(sum(g.count for g, _ in groups)), [k.gpus.count for g, k in groups for _ in range(g.count)]
        )
        nodes = [(group, kind) for group, kind in groups for _ in range(group.count)][: int(node_G[size - 1]) + 1]
        racks = {name: index for index, name in enumerate(dict.fromkeys(group.rack for group, _ in nodes))}
        rack = spec.links.inter_rack
        matrix = spec.links.rank_cost_matrix
        if matrix is not None and any(len(row) != len(matrix) for row in matrix):
            raise ValueError("links.rank_cost_matrix must be square")
        return cls(
            node_G=node_G[:size].astype(np.int64),
            rack_M=np.array([racks[group.rack] for group, _ in nodes], np.int64),
            node_latency_s=spec.links.inter_node.latency,
            rack_latency_s=rack.latency if rack else 0.0,
            rack_bytes_per_s=rack.bandwidth / rack.oversubscription if rack else float("inf"),
            curves=curves if any(curves) else (),
            rank_cost_GG=None if matrix is None else np.array(matrix, np.float64),
            model=spec.model,
            ep=spec.ep,
            tiers=spec.tiers,
            **columns,
            **{name: np.array([node_row(kind)[name] for _, kind in nodes]) for name in node_row(nodes[0][1])},
        )

    def to_json(self) -> dict[str, Any]:
        """Everything needed to build this cluster again, as JSON values."""
        arrays = {name: finite(value) for name, value in vars(self).items() if isinstance(value, np.ndarray | float)}
        if self.curves:
            arrays["curves"] = [list(map(list, curve)) for curve in self.curves]
        sections = {"model": self.model, "ep": self.ep, "tiers": self.tiers}
        return arrays | {name: section.model_dump(exclude_defaults=True) for name, section in sections.items()}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """Inverse of `to_json`; the file may come from outside, so every key is checked."""
        try:
            sections = ("model", "ep", "tiers")
            arrays = arrays_from_json({name: entry for name, entry in value.items() if name not in sections})
            return cls(
                model=ModelSpec.model_validate(value.get("model", {})),
                ep=ExpertParallel.model_validate(value.get("ep", {})),
                tiers=Tiers.model_validate(value.get("tiers", {})),
                **arrays,
            )
        except (KeyError, TypeError, ValidationError, OverflowError) as error:
            raise ValueError(f"cluster section: {error}") from error


def load_cluster(path: str | os.PathLike[str]) -> Cluster:
    """Read a cluster file (YAML, schema in docs/placement.md).

    Raises:
        ValueError: if the file is missing, is not YAML, or does not follow the schema; the message names the key.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"cluster {path}: no such file")
    if file.stat().st_size > MAX_SPEC_BYTES:
        raise ValueError(f"cluster {path}: larger than {MAX_SPEC_BYTES} bytes")
    try:
        value = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"cluster {path}: not readable as YAML: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"cluster {path}: expected a mapping with node_types and nodes; got {type(value).__name__}")
    return Cluster.from_mapping(value, f"cluster {path}")


def _explain(error: ValidationError) -> str:
    lines = []
    for problem in error.errors(include_url=False, include_context=False):
        where = ".".join(str(part) for part in problem["loc"]) or "file"
        what = "unknown key" if problem["type"] == "extra_forbidden" else problem["msg"].removeprefix("Value error, ")
        lines.append(f"{where}: {what}" + (f" (got {problem['input']!r})" if _is_short(problem["input"]) else ""))
    return "; ".join(lines[:8])


def _is_short(value: Any) -> bool:
    return isinstance(value, str | int | float | None)
