"""Plan: which expert lives in which slot of which GPU, and everything that an exporter needs; a versioned JSON file.

Shapes: L MoE layers, E experts, G GPUs, P slots of a layer. GPU g owns slots g*P/G .. (g+1)*P/G - 1.
"""

import json
import os
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self, cast, get_args

import numpy as np
from numpy.typing import NDArray

from routing.ground.files import write_json

from .certificate import Certificate
from .cluster import Cluster, Dispatch
from .homes import Homes

Integer = NDArray[np.int64]
# written into every plan; readers refuse others
VERSION = 1
FORMAT = "expertier.plan"
# 58 layers x 1,000,000 slots as text take 0.5 GiB; a larger file is no plan
MAX_PLAN_BYTES = 2 << 30
TIERS = ("gpu", "cpu", "ssd")
EMPTY = -1  # a slot without an expert, where GPUs differ or lower tiers hold the rest


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """Where every expert of every MoE layer lives.

    Args:
        physical_to_logical_LP: the expert in each slot; -1 is an empty slot, which only plans with `homes` have.
        num_experts: E; every expert has at least one slot, unless `tier_LE` or `homes` say that it lives elsewhere.
        cluster: the machines; GPU g owns the g-th part of each row of the map.
        layer_ids: decoder layer of each MoE layer.
        hidden_layers: decoder layers, dense ones included.
        dispatch: how the engine chooses between replicas.
        solver, objective_name: where the plan comes from.
        certificate: what is known about its quality, or None.
        tier_LE: 0 GPU, 1 CPU, 2 SSD for plans of one machine, or None: everything on GPUs, or several nodes.
        homes: copies in host memories and on SSDs, or None: the map (and `tier_LE`) say everything.
        experts_per_layer: real experts of each layer where layers differ, or None: E in all of them.
        metadata: JSON values: the mean loads (`load`) and names (`planned_on`) of the planning data.

    Raises:
        ValueError: if shapes disagree or a slot names an expert that does not exist.
    """

    physical_to_logical_LP: Integer
    num_experts: int
    cluster: Cluster
    layer_ids: tuple[int, ...]
    hidden_layers: int
    dispatch: Dispatch = "uniform"
    solver: str = ""
    objective_name: str = ""
    certificate: Certificate | None = None
    tier_LE: Integer | None = None
    homes: Homes | None = None
    experts_per_layer: tuple[int, ...] | None = None
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        map_LP = self.physical_to_logical_LP
        if map_LP.ndim != 2 or not np.issubdtype(map_LP.dtype, np.integer):
            raise ValueError(f"physical_to_logical_map must be integers [layers, slots]; got {map_LP.shape}")
        if map_LP.shape[0] != len(self.layer_ids):
            raise ValueError(f"{map_LP.shape[0]} rows of the map for {len(self.layer_ids)} layer_ids")
        if map_LP.shape[1] % self.cluster.num_gpus:
            raise ValueError(f"{map_LP.shape[1]} slots do not divide over {self.cluster.num_gpus} GPUs")
        least = 0 if self.homes is None else EMPTY
        if map_LP.size and (map_LP.min() < least or map_LP.max() >= self.num_experts):
            raise ValueError(f"slots must name experts 0..{self.num_experts - 1}; got {map_LP.min()}..{map_LP.max()}")
        if any(not 0 <= layer < self.hidden_layers for layer in self.layer_ids):
            raise ValueError(f"layer_ids must lie in 0..{self.hidden_layers - 1}; got {self.layer_ids}")
        if list(self.layer_ids) != sorted(set(self.layer_ids)):
            raise ValueError(f"layer_ids must rise and not repeat; got {self.layer_ids}")
        if self.tier_LE is not None and self.tier_LE.shape != (len(self.layer_ids), self.num_experts):
            raise ValueError(f"tier_LE must be {len(self.layer_ids)} x {self.num_experts}; got {self.tier_LE.shape}")
        wanted = (len(self.layer_ids), self.num_experts, self.cluster.num_nodes)
        if self.homes is not None and self.homes.host_LEM.shape != wanted:
            raise ValueError(f"homes must be [layers, experts, nodes] = {wanted}; got {self.homes.host_LEM.shape}")
        if (counts := self.experts_per_layer) is not None and (
            len(counts) != len(self.layer_ids) or not all(1 <= count <= self.num_experts for count in counts)
        ):
            raise ValueError(f"experts_per_layer must give each layer 1 to {self.num_experts}; got {counts}")
        object.__setattr__(self, "physical_to_logical_LP", map_LP.astype(np.int64, copy=False))

    @property
    def num_layers(self) -> int:
        """L: MoE layers, dense ones not counted."""
        return self.physical_to_logical_LP.shape[0]

    @property
    def num_slots(self) -> int:
        """P: slots of a layer over all GPUs."""
        return self.physical_to_logical_LP.shape[1]

    @property
    def slots_per_gpu(self) -> int:
        """P / G: slots of a layer on each GPU."""
        return self.num_slots // self.cluster.num_gpus

    @cached_property
    def copies_LEG(self) -> NDArray[np.int16]:
        """Copies of each expert on each GPU."""
        L, _ = self.physical_to_logical_LP.shape
        copies = np.zeros((L, self.num_experts, self.cluster.num_gpus), np.int16)
        layer_N, slot_N = np.nonzero(self.physical_to_logical_LP != EMPTY)
        gpu_N = slot_N // max(self.slots_per_gpu, 1)
        np.add.at(copies, (layer_N, self.physical_to_logical_LP[layer_N, slot_N], gpu_N), 1)
        return copies

    @property
    def experts_L(self) -> Integer:
        """Real experts of each layer."""
        if self.experts_per_layer is None:
            return np.full(self.num_layers, self.num_experts)
        return np.array(self.experts_per_layer, np.int64)

    @property
    def replicas_LE(self) -> Integer:
        """Copies of each expert."""
        return self.copies_LEG.sum(axis=2, dtype=np.int64)

    def with_certificate(self, certificate: Certificate) -> Self:
        """The same plan with another certificate."""
        return replace(self, certificate=certificate)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan file, atomically."""
        write_json(path, self.to_json())

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "version": VERSION,
            "num_experts": self.num_experts,
            "num_gpus": self.cluster.num_gpus,
            "slots_per_gpu": self.slots_per_gpu,
            "layer_ids": list(self.layer_ids),
            "hidden_layers": self.hidden_layers,
            "dispatch": self.dispatch,
            "solver": self.solver,
            "objective_name": self.objective_name,
            "certificate": self.certificate.to_json() if self.certificate else None,
            "tier": None if self.tier_LE is None else self.tier_LE.tolist(),
            **({} if self.homes is None else {"homes": self.homes.to_json()}),
            **({} if self.experts_per_layer is None else {"experts_per_layer": list(self.experts_per_layer)}),
            "metadata": self.metadata,
            "cluster": self.cluster.to_json(),
            "physical_to_logical_map": self.physical_to_logical_LP.tolist(),
        }

    @classmethod
    def from_json(cls, value: Any) -> Self:
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise ValueError(f"not a plan: expected a JSON object with format {FORMAT!r}")
        if value.get("version") != VERSION:
            raise ValueError(f"plan version {value.get('version')!r} is not supported; this program reads {VERSION}")
        if (
            missing := {"physical_to_logical_map", "num_experts", "cluster", "layer_ids", "hidden_layers"}
            - value.keys()
        ):
            raise ValueError(f"missing keys {sorted(missing)}")
        certificate, tier, counts = (value.get(key) for key in ("certificate", "tier", "experts_per_layer"))
        map_LP = _integers("physical_to_logical_map", value["physical_to_logical_map"])
        shape = len(map_LP), int(value["num_experts"])
        return cls(
            physical_to_logical_LP=map_LP,
            num_experts=int(value["num_experts"]),
            cluster=Cluster.from_json(value["cluster"]),
            layer_ids=tuple(int(layer) for layer in value["layer_ids"]),
            hidden_layers=int(value["hidden_layers"]),
            dispatch=_dispatch(value.get("dispatch", "uniform")),
            solver=str(value.get("solver", "")),
            objective_name=str(value.get("objective_name", "")),
            certificate=Certificate.from_json(certificate) if certificate else None,
            tier_LE=None if tier is None else _integers("tier", tier),
            homes=None if value.get("homes") is None else Homes.from_json(value["homes"], shape),
            experts_per_layer=None if counts is None else tuple(int(count) for count in counts),
            metadata=dict(value.get("metadata", {})),
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read and validate a plan file.

        Raises:
            ValueError: if the file is missing, too large, not JSON or not a valid plan.
        """
        file = Path(path)
        if not file.is_file():
            raise ValueError(f"plan {path}: no such file")
        if file.stat().st_size > MAX_PLAN_BYTES:
            raise ValueError(f"plan {path}: larger than {MAX_PLAN_BYTES} bytes")
        try:
            return cls.from_json(json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"plan {path}: {error}") from error


def _integers(name: str, rows: Any) -> Integer:
    try:
        array = np.array(rows)
    except ValueError as error:
        raise ValueError(f"{name} must be a rectangular table of integers: {error}") from error
    if array.ndim != 2 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name} must be a rectangular table of integers; got {array.dtype} {array.shape}")
    return array.astype(np.int64)


def _dispatch(name: Any) -> Dispatch:
    if name not in get_args(Dispatch):
        raise ValueError(f"dispatch must be one of {', '.join(get_args(Dispatch))}; got {name!r}")
    return cast(Dispatch, name)
