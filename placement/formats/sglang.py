"""SGLang `--init-expert-location`: JSON with exactly one key, rows for all hidden layers, dense ones included.

Source: sglang python/sglang/srt/eplb/expert_location.py; the mapping is passed on as keyword arguments, so any further
key is an error there. Shapes: P slots, E experts.
"""

import json
from pathlib import Path
from typing import Any

from routing.ground.files import write_json

from ..contract.plan import Plan
from .ktransformers import export_ktransformers, validate_ktransformers
from .reading import read_json, require_complete, table_of_ints

KEY = "physical_to_logical_map"


def export_sglang(plan: Plan, path: Path) -> None:
    """Write `{"physical_to_logical_map": [[...] per hidden layer]}`; dense layers get the initial layout."""
    identity = [slot % plan.num_experts for slot in range(plan.num_slots)]
    rows = [identity for _ in range(plan.hidden_layers)]
    for layer, row in zip(plan.layer_ids, plan.physical_to_logical_LP.tolist(), strict=True):
        rows[layer] = row
    write_json(path, {KEY: rows})


def export_sglang_count(plan: Plan, path: Path) -> None:
    """Write the other form, `{"logical_count": [[...]]}`: SGLang then runs its own EPLB on these loads at start-up."""
    export_ktransformers(plan, path)


def validate_sglang_count(path: Path, plan: Plan | None = None) -> None:
    """The same file as KTransformers reads: one key, [hidden layers, experts] of finite numbers."""
    validate_ktransformers(path, plan)


def validate_sglang(path: Path, plan: Plan | None = None) -> None:
    """Read the file as SGLang does.

    Raises:
        ValueError: with the first thing that SGLang would refuse, or that differs from `plan`.
    """
    value: Any = read_json(path)
    if not isinstance(value, dict) or list(value) != [KEY]:
        got = list(value) if isinstance(value, dict) else type(value).__name__
        raise ValueError(f"{path}: SGLang takes exactly one key {KEY!r}; got {json.dumps(got)}")
    rows = table_of_ints(path, value[KEY])
    require_complete(path, rows, plan.num_experts if plan else None)
    if plan is None:
        return
    if len(rows) != plan.hidden_layers:
        raise ValueError(f"{path}: expected one row per hidden layer ({plan.hidden_layers}); got {len(rows)}")
    for layer, row in zip(plan.layer_ids, plan.physical_to_logical_LP.tolist(), strict=True):
        if rows[layer] != row:
            raise ValueError(f"{path}: row {layer} is not what the plan says")
