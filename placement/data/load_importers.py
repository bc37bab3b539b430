"""Expert loads that engines record, as [rows, E] tables with the decoder layers of the rows where they are recorded.

Torch files are read with `weights_only=True` and need torch. Shapes: L layers, E experts, P physical slots.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from routing.ground.expect import expect_name
from routing.traces import load_torch
from routing.traces.importers.reading.arrays import load_safetensors
from routing.traces.importers.reading.opening import files_of, id_table, json_records, wanted, whole
from routing.traces.importers.sglang import ranks_beside

from .loads import LoadFile, checked_loads

Float = NDArray[np.float64]
Integer = NDArray[np.int64]
_STAT_KEY = re.compile(r"^(\d+)_(\d+)$")
_RANK_FILE = re.compile(r"^rank(\d+)\.safetensors$")
_MAP, _PASSES = "last_physical_to_logical_map", "global_physical_count"


def import_load_file(path: Path, format_name: str) -> LoadFile:
    """Read a recording by the name of its format.

    Raises:
        ValueError: if there is no such format, or the recording does not follow it.
    """
    expect_name(format_name, LOAD_IMPORTERS, "loads format")
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    try:
        return LOAD_IMPORTERS[format_name](path)
    except ValueError as error:
        raise ValueError(f"{error} (format {format_name}: {_READS[format_name]})") from None


def import_loads(path: Path, format_name: str) -> Float:
    """The loads of a recording, [rows, E].

    Raises:
        ValueError: if there is no such format, or the recording does not follow it.
    """
    return import_load_file(path, format_name).load_LE


def read_sglang_dump(path: Path) -> LoadFile:
    """SGLang recorder dumps: a .pt of mode stat (`logical_count`), or per_pass files (a folder: ranks are summed).

    Files of mode stat hold the sum over ranks already, so equal ones count once.
    """
    if not path.is_dir() and (others := ranks_beside(path)):
        raise ValueError(f"{path}: one rank of several; {others[0].name} lies beside it. Import the folder")
    found: list[Float] = []
    ranks: set[int] = set()
    for file in files_of(path, "*.pt"):
        value = load_torch(file)
        if not isinstance(value, dict):
            raise ValueError(f"{file}: expected a dictionary; got {type(value).__name__}")
        if "logical_count" in value:
            load_LE = checked_loads(
                _numbers(value["logical_count"], f"{file}: logical_count"), f"{file}: logical_count"
            )
            found += [] if any(np.array_equal(load_LE, other) for other in found) else [load_LE]
        else:
            ranks |= {whole(record.get("rank") or 0, str(file), "rank") for record in _passes(file, value)}
            found.append(_from_passes(file, value))
    if missing := set(range(max(ranks, default=-1) + 1)) - ranks:
        raise ValueError(
            f"{path}: has the passes of ranks {sorted(ranks)[:8]} and lacks those of {sorted(missing)[:8]}; "
            "put the files of all ranks into one folder and import the folder"
        )
    return LoadFile(load_LE=_sum(path, found))


def read_tensorrt_statistics(path: Path) -> LoadFile:
    """TensorRT-LLM EXPERT_STATISTIC_PATH: meta_info.json and rank*.safetensors with keys `iteration_layer`, summed."""
    meta = path / "meta_info.json"
    if not meta.is_file():
        raise ValueError(f"{path}: expected a folder with meta_info.json and rank*.safetensors")
    where, record = next(json_records(meta))
    experts = whole(wanted(record, where, "num_experts")[0], where, "num_experts")
    ranks = {int(match[1]): file for file in path.iterdir() if (match := _RANK_FILE.match(file.name))}
    if missing := set(range(max(ranks, default=0) + 1)) - ranks.keys():
        raise ValueError(f"{path}: has rank files {sorted(ranks)[:8]} and lacks those of ranks {sorted(missing)[:8]}")
    layers: dict[int, Float] = {}
    for _, file in sorted(ranks.items()):
        for (_, layer), count in _statistic_tensors(file).items():
            if count.shape != (experts,):
                raise ValueError(f"{file}: layer {layer} has counts of shape {count.shape}; meta_info says {experts}")
            layers[layer] = layers.get(layer, np.zeros(experts)) + count
    if not layers:
        raise ValueError(f"{path}: no statistics in {len(ranks)} rank files")
    load_LE = np.zeros((max(layers) + 1, experts))
    for layer, count in layers.items():
        load_LE[layer] = count
    return LoadFile(load_LE=checked_loads(load_LE, f"{path}: counts"), layer_ids=tuple(sorted(layers)))


def read_vllm_load_stats(path: Path) -> LoadFile:
    """vLLM pull request 41141: JSON lines of `eplb_load_stats`; physical loads are folded by their map and summed."""
    found = []
    for where, record in json_records(path, "*.jsonl"):
        if record.get("record_type") != "eplb_load_stats":
            continue
        load, mapping = wanted(record, where, "expert_load", "p2l_map")
        load_LP = checked_loads(_numbers(load, f"{where}: expert_load"), f"{where}: expert_load")
        found.append(_fold(load_LP, id_table(mapping, f"{where}, p2l_map", "[layers, slots]"), where))
    if not found:
        raise ValueError(f"{path}: no line of record_type eplb_load_stats")
    return LoadFile(load_LE=_sum(path, found))


def _passes(file: Path, value: dict[str, Any]) -> list[dict[str, Any]]:
    records, _ = wanted(value, str(file), "records", _MAP)
    if not isinstance(records, list) or not records or not all(isinstance(record, dict) for record in records):
        raise ValueError(f"{file}: holds no records of forward passes")
    if _PASSES not in records[0] and "topk_ids_of_layer" in records[0]:
        raise ValueError(f"{file}: holds tokens, not loads; read it with `expertier trace import`")
    return records


def _from_passes(file: Path, value: dict[str, Any]) -> Float:
    counts = []
    for number, record in enumerate(_passes(file, value)):
        where = f"{file}, record {number}"
        counts.append(checked_loads(_numbers(wanted(record, where, _PASSES)[0], where), f"{where}: {_PASSES}"))
    return _fold(_sum(file, counts), id_table(value[_MAP], f"{file}, {_MAP}", "[layers, slots]"), str(file))


def _fold(load_LP: Float, map_LP: Integer, where: str) -> Float:
    """Loads of experts from those of slots; every expert has a slot, so the map says how many there are."""
    if load_LP.shape != map_LP.shape or map_LP.min(initial=0) < 0:
        raise ValueError(f"{where}: loads {load_LP.shape} and the map {map_LP.shape} of experts >= 0 must agree")
    load_LE = np.zeros((len(map_LP), int(map_LP.max()) + 1))
    np.add.at(load_LE, (np.arange(len(map_LP))[:, None], map_LP), load_LP)
    return load_LE


def _sum(path: Path, tables: list[Float]) -> Float:
    if len(shapes := {table.shape for table in tables}) != 1:
        raise ValueError(f"{path}: recordings of different [layers, experts]: {sorted(shapes)}")
    return np.asarray(np.sum(tables, axis=0))


def _numbers(value: Any, where: str) -> Float:
    try:
        return np.asarray(value, np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"{where}: expected a rectangular table of numbers; got {type(value).__name__}") from None


def _statistic_tensors(file: Path) -> dict[tuple[int, int], Float]:
    found = {}
    for name, tensor in load_safetensors(file).items():
        match = _STAT_KEY.match(name)
        if match is None:
            raise ValueError(f"{file}: expected keys iteration_layer; got {name!r}")
        found[int(match[1]), int(match[2])] = np.asarray(tensor, np.float64)
    return found


LOAD_IMPORTERS: dict[str, Callable[[Path], LoadFile]] = {
    "sglang": read_sglang_dump,
    "tensorrt-llm": read_tensorrt_statistics,
    "vllm": read_vllm_load_stats,
}
_READS = {
    "sglang": "SGLang's recorder, mode stat or per_pass (.pt)",
    "tensorrt-llm": "the folder of EXPERT_STATISTIC_PATH",
    "vllm": "JSON lines of eplb_load_stats",
}
