"""vllm-ascend `eplb_config.expert_map_path` JSON: MoE layers by ordinal, experts per device.

Source: vllm_ascend/eplb (182b75e); lists of equal length, copies of one expert on different devices.
"""

from pathlib import Path
from typing import Any

from routing.ground.files import write_json

from ..checking.check import doubled_copies
from ..contract.plan import Plan
from .reading import read_json, require_complete, table_of_ints


def export_vllm_ascend(plan: Plan, path: Path) -> None:
    """Write moe_layer_count and layer_list[{layer_id, device_count, device_list[{device_id, device_expert}]}].

    Raises:
        ValueError: if a device holds two copies of one expert, which this engine refuses.
    """
    if doubled := doubled_copies(plan):
        raise ValueError(
            f"{doubled} slots hold a second copy of an expert on their device, which vllm-ascend refuses; "
            "solve again with --solver auto (EPLB's plans may double copies)"
        )
    devices = plan.cluster.num_gpus
    layers = []
    for ordinal, row in enumerate(plan.physical_to_logical_LP.reshape(plan.num_layers, devices, -1).tolist()):
        listed = [{"device_id": device, "device_expert": experts} for device, experts in enumerate(row)]
        layers.append({"layer_id": ordinal, "device_count": devices, "device_list": listed})
    write_json(path, {"moe_layer_count": plan.num_layers, "layer_list": layers})


def validate_vllm_ascend(path: Path, plan: Plan | None = None) -> None:
    """Read the file as vllm-ascend does.

    Raises:
        ValueError: with the first thing that the engine would refuse, or that differs from `plan`.
    """
    value: Any = read_json(path)
    try:
        layers = value["layer_list"]
        if value["moe_layer_count"] != len(layers):
            raise ValueError(f"{path}: moe_layer_count is {value['moe_layer_count']}, there are {len(layers)} layers")
        tables = [_devices(path, ordinal, layer) for ordinal, layer in enumerate(layers)]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: missing or misplaced key {error}") from error
    rows = [[expert for device in table for expert in device] for table in tables]
    require_complete(path, rows, plan.num_experts if plan else None)
    if plan and rows != plan.physical_to_logical_LP.tolist():
        raise ValueError(f"{path}: the layers are not what the plan says")


def _devices(path: Path, ordinal: int, layer: dict[str, Any]) -> list[list[int]]:
    listed = layer["device_list"]
    if layer["layer_id"] != ordinal or layer["device_count"] != len(listed):
        raise ValueError(f"{path}: layer {ordinal} must have layer_id {ordinal} and device_count {len(listed)}")
    if [device["device_id"] for device in listed] != list(range(len(listed))):
        raise ValueError(f"{path}: layer {ordinal} must list devices 0..{len(listed) - 1} in order")
    table = table_of_ints(path, [device["device_expert"] for device in listed])
    if any(len(set(device)) < len(device) for device in table):
        raise ValueError(f"{path}: layer {ordinal} has two copies of one expert on one device")
    return table
