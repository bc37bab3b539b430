"""vLLM: one JSON line for `eplb_config.initial_mapping_path` (upstream pull request 41141); layers by MoE ordinal.

`{"expert_to_ep_rank": [...]}` (pull request 34811) is written instead when the plan has one map for all layers, no
replicas, and the file name ends in `.placement.json`. Neither is merged upstream.
"""

import json
from pathlib import Path
from typing import Any

from routing.ground.files import atomic_write, write_json

from ..contract.plan import Plan
from .reading import read_json, require_complete, table_of_ints

RECORD = "eplb_initial_mapping"
ONE_MAP_SUFFIX = ".placement.json"
KEYS = {"record_type", "version", "num_redundant_experts", "num_slots", "initial_global_assignments"}


def export_vllm(plan: Plan, path: Path) -> None:
    """Write the mapping record, or the one-map file for a name that ends in `.placement.json`.

    Raises:
        ValueError: if the one-map file is asked for and the plan has replicas or layers that differ.
    """
    if path.name.endswith(ONE_MAP_SUFFIX):
        write_json(path, {"expert_to_ep_rank": _one_map(plan)})
        return
    rows = plan.physical_to_logical_LP.tolist()
    record = {
        "record_type": RECORD,
        "version": 1,
        "num_redundant_experts": plan.num_slots - plan.num_experts,
        "num_slots": plan.num_slots,
        "initial_global_assignments": {str(ordinal): row for ordinal, row in enumerate(rows)},
    }
    with atomic_write(path) as file:
        file.write(json.dumps(record, allow_nan=False) + "\n")


def validate_vllm(path: Path, plan: Plan | None = None) -> None:
    """Read the file as the pull requests do.

    Raises:
        ValueError: with the first thing that would be refused, or that differs from `plan`.
    """
    value: Any = read_json(path)
    if isinstance(value, dict) and "expert_to_ep_rank" in value:
        if plan and value["expert_to_ep_rank"] != _one_map(plan):
            raise ValueError(f"{path}: expert_to_ep_rank is not what the plan says")
        return
    if not isinstance(value, dict) or value.keys() != KEYS or value["record_type"] != RECORD or value["version"] != 1:
        raise ValueError(f"{path}: expected one record of type {RECORD}, version 1, with the keys {sorted(KEYS)}")
    assignments = value["initial_global_assignments"]
    if not isinstance(assignments, dict) or list(assignments) != [str(n) for n in range(len(assignments))]:
        raise ValueError(f'{path}: initial_global_assignments must have the keys "0", "1", ... in order')
    rows = table_of_ints(path, list(assignments.values()))
    experts = value["num_slots"] - value["num_redundant_experts"]
    if len(rows[0]) != value["num_slots"]:
        raise ValueError(f"{path}: num_slots is {value['num_slots']}, the rows have {len(rows[0])}")
    require_complete(path, rows, experts)
    if plan and rows != plan.physical_to_logical_LP.tolist():
        raise ValueError(f"{path}: the assignments are not what the plan says")


def _one_map(plan: Plan) -> list[int]:
    rows = plan.physical_to_logical_LP
    if plan.num_slots != plan.num_experts or (rows != rows[0]).any():
        raise ValueError(
            "expert_to_ep_rank is one map for all layers without replicas; this plan has replicas or differing layers: "
            f"use a file name that does not end in {ONE_MAP_SUFFIX}"
        )
    rank_of = {expert: slot // plan.slots_per_gpu for slot, expert in enumerate(rows[0].tolist())}
    return [rank_of[expert] for expert in range(plan.num_experts)]
