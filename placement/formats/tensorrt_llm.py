"""TensorRT-LLM `moe_config.load_balancer` YAML: slots per absolute decoder layer.

Source: tensorrt_llm/llmapi/llm_args.py (MoeLoadBalancerConfig, strict), examples/wide_ep/generate_eplb_config.py.
"""

from pathlib import Path

import yaml

from routing.ground.files import atomic_write

from ..contract.plan import Plan
from .reading import MAX_BYTES, require_complete, table_of_ints

KEYS = {"num_slots", "initial_global_assignments", "layer_updates_per_iter"}


def export_tensorrt_llm(plan: Plan, path: Path) -> None:
    """Write num_slots, initial_global_assignments {decoder layer: [expert per slot]} and layer_updates_per_iter: 0."""
    rows = plan.physical_to_logical_LP.tolist()
    value = {
        "num_slots": plan.num_slots,
        "initial_global_assignments": dict(zip(plan.layer_ids, rows, strict=True)),
        "layer_updates_per_iter": 0,
    }
    with atomic_write(path) as file:
        yaml.safe_dump(value, file, default_flow_style=None, sort_keys=False, width=10**6)


def validate_tensorrt_llm(path: Path, plan: Plan | None = None) -> None:
    """Read the file as MoeLoadBalancerConfig does.

    Raises:
        ValueError: with the first thing that TensorRT-LLM would refuse, or that differs from `plan`.
    """
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path}: larger than {MAX_BYTES} bytes")
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not readable as YAML: {error}") from error
    if not isinstance(value, dict) or not value.keys() <= KEYS or "num_slots" not in value:
        raise ValueError(f"{path}: expected only the keys {sorted(KEYS)}")
    assignments = value.get("initial_global_assignments")
    if not isinstance(assignments, dict) or not all(type(layer) is int for layer in assignments):
        raise ValueError(f"{path}: initial_global_assignments must map absolute layer numbers to lists of experts")
    rows = table_of_ints(path, list(assignments.values()))
    if len(rows[0]) != value["num_slots"]:
        raise ValueError(f"{path}: num_slots is {value['num_slots']}, the rows have {len(rows[0])}")
    require_complete(path, rows, plan.num_experts if plan else None)
    if plan and assignments != dict(zip(plan.layer_ids, plan.physical_to_logical_LP.tolist(), strict=True)):
        raise ValueError(f"{path}: the assignments are not what the plan says")
