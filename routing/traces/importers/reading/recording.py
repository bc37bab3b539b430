"""Recording: what an importer read, what it left out and why; nothing may be missing without a reason.

Shapes: T tokens, L MoE layers, K experts per token, E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...routing_trace import EMPTY

Integer = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """What a recording may not say about itself; None where the recording shall say it.

    Args:
        num_experts: E, the experts that compute.
        zero_experts: Z; ids E..E+Z-1 compute nothing and become empty slots.
        top_k: K, for router logits and for SGLang's responses, which hold bare ids.
        pipeline_stages: for Megatron, whose tracer numbers the layers of each stage from 0.
    """

    num_experts: int | None = None
    zero_experts: int = 0
    top_k: int | None = None
    pipeline_stages: int | None = None

    def __post_init__(self) -> None:
        for name in ("num_experts", "top_k", "pipeline_stages"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}")
        if self.zero_experts < 0:
            raise ValueError(f"zero_experts must not be negative; got {self.zero_experts}")
        if self.zero_experts and self.num_experts is None:
            raise ValueError("zero_experts are the ids from num_experts on; give num_experts too")


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """Part of a recording that is not in the trace.

    Args:
        unit: `tokens`, `layers` or `lines`.
        count: how many.
        reason: completes "120 lines: ...".
    """

    unit: str
    count: int
    reason: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Recording:
    """A recording as read.

    Args:
        expert_TLK: int64 expert ids, -1 where a slot is empty; rows request by request, each in order of positions.
        sequence_T: the request of each row, from 0.
        position_T: position of each row in its request, or None where the format does not say.
        layer_ids: recorded decoder layer of each of the L layers, or None where the format does not say.
        hidden_layers: decoder layers in all, dense ones included, or None.
        num_experts: E, or None where the format does not say.
        read: how many `lines`, `tokens`, `layers` the files held.
        left_out: everything that was read and not kept.
        notes: what a reader of the trace should know, one sentence each.
    """

    expert_TLK: Integer
    sequence_T: Integer
    position_T: Integer | None = None
    layer_ids: tuple[int, ...] | None = None
    hidden_layers: int | None = None
    num_experts: int | None = None
    read: dict[str, int] = field(default_factory=dict)
    left_out: tuple[LeftOut, ...] = ()
    notes: tuple[str, ...] = ()

    def report(self, num_experts: int) -> dict[str, Any]:
        """What was read against what is kept, as JSON values.

        Raises:
            ValueError: if tokens or layers are missing without a reason.
        """
        T, L, _ = self.expert_TLK.shape
        kept = {"tokens": T, "layers": L, "experts": num_experts, "requests": len(np.unique(self.sequence_T))}
        for unit in ("tokens", "layers"):
            explained = sum(part.count for part in self.left_out if part.unit == unit)
            if unit in self.read and self.read[unit] != kept[unit] + explained:
                raise ValueError(
                    f"{self.read[unit]} {unit} were read, {kept[unit]} kept and {explained} left out for known reasons"
                )
        left_out = [vars(part) for part in self.left_out if part.count]
        return {"read": self.read, "kept": kept, "left_out": left_out, "notes": list(self.notes)}


def unequal(where: str, shapes: set[tuple[int, ...]], what: str) -> ValueError:
    """The error for parts that should have one shape."""
    return ValueError(f"{where}: {what} must agree; got {', '.join(map(str, sorted(shapes)))}")


def one_after_another(tables: Sequence[Integer], where: str) -> tuple[Integer, Integer, Integer]:
    """Requests `[tokens, L, K]` as rows, with the request and the position of each row.

    Raises:
        ValueError: if there is no row, or L or K differ between requests.
    """
    if not tables or not sum(map(len, tables)):
        raise ValueError(f"{where}: holds no routed tokens")
    if len(shapes := {table.shape[1:] for table in tables}) != 1:
        raise unequal(where, shapes, "[layers, K] of all requests")
    lengths = [len(table) for table in tables]
    position_T = np.concatenate([np.arange(length) for length in lengths])
    return np.concatenate(tables), np.repeat(np.arange(len(tables)), lengths), position_T


def routed_layers(expert_TLK: Integer) -> NDArray[np.bool_]:
    """Which layers route: in a dense layer's buffer all K slots of a token hold one id (K > 1), or none."""
    repeats_L = (expert_TLK == expert_TLK[:, :, :1]).all(axis=(0, 2))
    empty_L = (expert_TLK == EMPTY).all(axis=(0, 2))
    return ~empty_L if expert_TLK.shape[2] == 1 else ~(empty_L | repeats_L)


def without_dense_layers(expert_TLK: Integer, where: str) -> tuple[Integer, tuple[int, ...] | None, LeftOut]:
    """Drop the layers that do not route; if there are any, the others' numbers are those of decoder layers.

    Raises:
        ValueError: if no layer routes.
    """
    routed_L = routed_layers(expert_TLK)
    if not routed_L.any():
        raise ValueError(f"{where}: no layer has {expert_TLK.shape[2]} different experts for any token")
    reason = "dense layers, which have no routing"
    left_out = LeftOut(unit="layers", count=int((~routed_L).sum()), reason=reason)
    layer_ids = None if routed_L.all() else tuple(np.flatnonzero(routed_L).tolist())
    return expert_TLK[:, routed_L], layer_ids, left_out
