"""Expert loads that engines record, as [hidden layers, E] tables.

Torch files are read with `weights_only=True` and need torch. Shapes: L layers, E experts, P physical slots.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from routing.traces import load_torch

Float = NDArray[np.float64]
MAX_TENSOR_BYTES = 4 << 30
_STAT_KEY = re.compile(r"^(\d+)_(\d+)$")


def read_sglang_dump(path: Path) -> Float:
    """SGLang recorder dumps: a .pt of mode stat (`logical_count`), or per_pass files (a folder: ranks are summed)."""
    files = sorted(path.glob("*.pt")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{path}: no .pt files")
    total: Float | None = None
    for file in files:
        value = load_torch(file)
        if not isinstance(value, dict):
            raise ValueError(f"{file}: expected a dictionary; got {type(value).__name__}")
        found = _logical_count(file, value) if "logical_count" in value else _from_passes(file, value)
        total = found if total is None else total + found
    assert total is not None
    return total


def read_tensorrt_statistics(path: Path) -> Float:
    """TensorRT-LLM EXPERT_STATISTIC_PATH: meta_info.json and rank*.safetensors with keys `iteration_layer`, summed."""
    meta = path / "meta_info.json"
    if not meta.is_file():
        raise ValueError(f"{path}: expected a folder with meta_info.json and rank*.safetensors")
    experts = int(json.loads(meta.read_text(encoding="utf-8"))["num_experts"])
    files = [file for file in sorted(path.glob("rank*.safetensors")) if "_raw" not in file.name]
    layers: dict[int, Float] = {}
    for file in files:
        for (_, layer), count in _statistic_tensors(file).items():
            if count.shape != (experts,):
                raise ValueError(f"{file}: layer {layer} has counts of shape {count.shape}; meta_info says {experts}")
            layers[layer] = layers.get(layer, np.zeros(experts)) + count
    if not layers:
        raise ValueError(f"{path}: no statistics in {len(files)} rank files")
    load = np.zeros((max(layers) + 1, experts))
    for layer, count in layers.items():
        load[layer] = count
    return load


def read_vllm_load_stats(path: Path) -> Float:
    """vLLM pull request 41141: JSON lines of `eplb_load_stats`; physical loads are folded by their map and summed."""
    total: Float | None = None
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record.get("record_type") != "eplb_load_stats":
            continue
        load_LP, map_LP = np.array(record["expert_load"], np.float64), np.array(record["p2l_map"], np.int64)
        if load_LP.shape != map_LP.shape or load_LP.ndim != 2:
            raise ValueError(f"{path}: expert_load {load_LP.shape} and p2l_map {map_LP.shape} must agree")
        folded = _fold(load_LP, map_LP)
        total = folded if total is None else total + folded
    if total is None:
        raise ValueError(f"{path}: no line of record_type eplb_load_stats")
    return total


def _logical_count(file: Path, value: dict[str, object]) -> Float:
    count = np.asarray(value["logical_count"], np.float64)
    if count.ndim not in (2, 3):
        raise ValueError(f"{file}: logical_count must be [L, E] or [steps, L, E]; got {count.shape}")
    return np.asarray(count.sum(axis=0) if count.ndim == 3 else count)


def _from_passes(file: Path, value: dict[str, object]) -> Float:
    records, mapping = value.get("records"), value.get("last_physical_to_logical_map")
    if not isinstance(records, list) or mapping is None:
        raise ValueError(f"{file}: neither logical_count nor records with last_physical_to_logical_map")
    counts = [np.asarray(record["global_physical_count"], np.float64) for record in records]
    return _fold(np.sum(counts, axis=0), np.asarray(mapping, np.int64))


def _fold(load_LP: Float, map_LP: NDArray[np.int64]) -> Float:
    load_LE = np.zeros((len(map_LP), int(map_LP.max()) + 1))
    np.add.at(load_LE, (np.arange(len(map_LP))[:, None], map_LP), load_LP)
    return load_LE


def _statistic_tensors(file: Path) -> dict[tuple[int, int], Float]:
    from safetensors.numpy import load_file

    if file.stat().st_size > MAX_TENSOR_BYTES:
        raise ValueError(f"{file}: larger than {MAX_TENSOR_BYTES} bytes")
    found = {}
    for name, tensor in load_file(file).items():
        match = _STAT_KEY.match(name)
        if match is None:
            raise ValueError(f"{file}: expected keys iteration_layer; got {name!r}")
        found[int(match[1]), int(match[2])] = np.asarray(tensor, np.float64)
    return found


def import_loads(path: Path, format_name: str) -> Float:
    """Read a recording by the name of its format.

    Raises:
        ValueError: if there is no such format or the recording does not follow it.
    """
    if format_name not in LOAD_IMPORTERS:
        raise ValueError(f"unknown loads format {format_name!r}; there are {', '.join(LOAD_IMPORTERS)}")
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    try:
        load = LOAD_IMPORTERS[format_name](path)
    except (KeyError, TypeError, IndexError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a {format_name} recording: {type(error).__name__} {error}") from error
    if not np.all(np.isfinite(load)) or np.any(load < 0):
        raise ValueError(f"{path}: loads must be finite and not negative")
    return load


LOAD_IMPORTERS: dict[str, Callable[[Path], Float]] = {
    "sglang": read_sglang_dump,
    "tensorrt-llm": read_tensorrt_statistics,
    "vllm": read_vllm_load_stats,
}
