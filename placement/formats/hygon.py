"""Hygon's vLLM plugin (vllm_hcu) `eplb_config.expert_map_path` JSON: MoE layers by ordinal, experts per slot.

Version 1 holds one model and is what we write. Version 2 holds maps by model class (`model_maps`), as the plugin
records them; one of them must be the plan's. Source: the plugin's documentation and its reader.
"""

from pathlib import Path
from typing import Any

from routing.ground.files import write_json

from ..contract.plan import Plan
from .reading import read_json, require_complete, table_of_ints

ONE_MODEL = "vllm_offline_eplb_physical_to_logical"
BY_MODEL = "vllm_offline_eplb_physical_to_logical_by_model"


def export_hygon(plan: Plan, path: Path) -> None:
    """Write version 1: the map with its sizes, without the names of a model, which a plan does not know."""
    write_json(path, {"version": 1, "format": ONE_MODEL, **_sizes(plan), "physical_to_logical_map": _rows(plan)})


def validate_hygon(path: Path, plan: Plan | None = None) -> None:
    """Read the file as the plugin does.

    Raises:
        ValueError: with the first thing that the plugin would refuse, or that differs from `plan`.
    """
    maps = _maps(path)
    if plan and _rows(plan) not in maps:
        raise ValueError(f"{path}: the map is not what the plan says")


def read_hygon(path: Path) -> tuple[list[list[int]], None]:
    """The experts in the slots of each layer; how many GPUs there are, the file does not say.

    Raises:
        ValueError: as above, and where the file holds several models.
    """
    maps = _maps(path)
    if len(maps) > 1:
        raise ValueError(f"{path}: maps of {len(maps)} models; keep the one that is to be read")
    return maps[0], None


def _maps(path: Path) -> list[list[list[int]]]:
    return [_checked(path, entry) for entry in _entries(path, read_json(path))]


def _entries(path: Path, value: Any) -> list[Any]:
    """The maps of one model or of several."""
    kind = (value.get("version"), value.get("format")) if isinstance(value, dict) else (None, None)
    if kind == (1, ONE_MODEL):
        return [value]
    if kind == (2, BY_MODEL) and isinstance(value.get("model_maps"), dict) and value["model_maps"]:
        return list(value["model_maps"].values())
    raise ValueError(f"{path}: expected version 1 of {ONE_MODEL} or version 2 of {BY_MODEL}; got {kind}")


def _checked(path: Path, entry: Any) -> list[list[int]]:
    """The rows of one model; sizes that stand beside them must agree."""
    rows = table_of_ints(path, entry.get("physical_to_logical_map") if isinstance(entry, dict) else None)
    experts = max(map(max, rows)) + 1
    require_complete(path, rows, experts)
    found = {
        "num_moe_layers": len(rows),
        "num_logical_experts": experts,
        "num_physical_experts": len(rows[0]),
        "num_redundant_experts": len(rows[0]) - experts,
    }
    if wrong := [name for name, size in found.items() if entry.get(name, size) != size]:
        raise ValueError(f"{path}: {wrong[0]} is {entry[wrong[0]]}, the map has {found[wrong[0]]}")
    return rows


def _sizes(plan: Plan) -> dict[str, int]:
    return {
        "num_moe_layers": plan.num_layers,
        "num_logical_experts": plan.num_experts,
        "num_physical_experts": plan.num_slots,
        "num_redundant_experts": plan.num_slots - plan.num_experts,
    }


def _rows(plan: Plan) -> list[list[int]]:
    rows: list[list[int]] = plan.physical_to_logical_LP.tolist()
    return rows
