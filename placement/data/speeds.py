"""Measured seconds of one expert by GPU and batch, and the same as curves of a cluster file.

The file is CSV with the columns gpu, batch, seconds, or a JSON list of objects with these keys. `gpu` is a GPU type of
the cluster file, or the rank of one GPU. `batch` is the rows that one expert computes. Repeated measurements count
by their median.
"""

import copy
import csv
import io
import json
import math
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

from routing.ground.quantity import parse_seconds

KEYS = ("gpu", "batch", "seconds")
# ten times what a sweep over every GPU of a large cluster gives; larger files are no measurements
MAX_BYTES, MAX_ROWS = 16 << 20, 200_000
MAX_BATCH, MAX_SECONDS = 1 << 24, 3600.0
# of a curve that falls, or whose rows get dearer, by noise: a cluster file must not have either, and more is no noise
MOST_CORRECTION = 0.2
ROUNDING = 1e-12  # so that a line through 0 does not rise by the last bit
Curve = dict[int, float]


def read_speeds(path: Path) -> dict[str, Curve]:
    """Median seconds by batch of each GPU or GPU type that the file names.

    Raises:
        ValueError: if the file is missing, too large, or has a row that is no measurement.
    """
    if not path.is_file():
        raise ValueError(f"speeds {path}: no such file")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"speeds {path}: larger than {MAX_BYTES} bytes")
    try:
        text = path.read_text(encoding="utf-8-sig")
        rows = json.loads(text) if text.lstrip().startswith(("[", "{")) else list(csv.DictReader(io.StringIO(text)))
    except (ValueError, csv.Error, RecursionError) as error:
        raise ValueError(f"speeds {path}: not readable: {error}") from error
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"speeds {path}: expected rows of {', '.join(KEYS)}")
    if len(rows) > MAX_ROWS:
        raise ValueError(f"speeds {path}: {len(rows)} rows; at most {MAX_ROWS} are read")
    found: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for number, row in enumerate(rows, start=1):
        gpu, batch, seconds = _measurement(f"speeds {path}: row {number}", row)
        found[gpu][batch].append(seconds)
    return {gpu: {batch: median(found[gpu][batch]) for batch in sorted(found[gpu])} for gpu in found}


def _measurement(where: str, row: Any) -> tuple[str, int, float]:
    if not isinstance(row, dict) or set(row) != set(KEYS):
        raise ValueError(f"{where}: expected {', '.join(KEYS)} and nothing else; got {str(row)[:80]}")
    gpu = str(row["gpu"]).strip()
    try:
        batch, seconds = int(row["batch"]), parse_seconds(row["seconds"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error
    if not gpu or not 1 <= batch <= MAX_BATCH or not 0 < seconds <= MAX_SECONDS:
        raise ValueError(
            f"{where}: expected a GPU, 1 to {MAX_BATCH} rows and up to {MAX_SECONDS:g} s; "
            f"got {gpu!r}, {batch}, {seconds}"
        )
    return gpu, batch, seconds


def smoothed(curve: Curve) -> tuple[Curve, float]:
    """The curve without what noise did: seconds do not fall with rows, seconds per row do not rise.

    Returns:
        The curve, and the largest relative change.
    """
    found: Curve = {}
    worst, before = 0.0, None
    for batch in sorted(curve):
        seconds = curve[batch]
        if before is not None:
            seconds = min(max(seconds, found[before]), found[before] * batch / before * (1 - ROUNDING))
        worst = max(worst, abs(seconds / curve[batch] - 1))
        found[batch], before = seconds, batch
    return found, worst


def with_speeds(cluster: dict[str, Any], speeds: dict[str, Curve]) -> tuple[dict[str, Any], list[str]]:
    """A cluster file's mapping with measured curves.

    A type gets its curve. A GPU by rank gets a type of its own with its curve, and a speed relative to the mean of the
    measured GPUs at the largest batch that all of them were measured at.

    Args:
        cluster: as read from YAML, valid.
        speeds: as `read_speeds` gives them.

    Returns:
        The new mapping, and what was changed by more than rounding, for people.

    Raises:
        ValueError: for names that are neither a type nor a rank, and for curves that are more than noisy.
    """
    found, notes = copy.deepcopy(cluster), list[str]()
    types = found.setdefault("gpu_types", {"default": {}})
    ranks = {gpu: curve for gpu, curve in speeds.items() if gpu not in types}
    for gpu, curve in speeds.items():
        better, change = smoothed(curve)
        if change > MOST_CORRECTION:
            raise ValueError(
                f"speeds of {gpu}: seconds must not fall with rows, nor seconds per row rise; they do by {change:.0%}, "
                "which is more than noise: measure again"
            )
        if change > 0:
            notes.append(f"speeds of {gpu}: smoothed by up to {change:.1%}")
        speeds = {**speeds, gpu: better}
    for gpu in speeds.keys() - ranks.keys():
        types[gpu] = {**(types[gpu] or {}), "expert_seconds": speeds[gpu]}
    if ranks:
        _set_ranks(found, {gpu: speeds[gpu] for gpu in ranks}, notes)
    return found, notes


def _set_ranks(cluster: dict[str, Any], speeds: dict[str, Curve], notes: list[str]) -> None:
    """Give single GPUs their curves and speeds: every node becomes a group of its own."""
    types, nodes = cluster["gpu_types"], list[dict[str, Any]]()
    for group in cluster["nodes"]:
        nodes += [copy.deepcopy({**group, "count": 1}) for _ in range(int(group.get("count", 1)))]
    places = [
        (node, index) for node in nodes for index in range(int(cluster["node_types"][node["type"]]["gpus"]["count"]))
    ]
    relative = _relative(speeds, notes)
    for gpu, curve in speeds.items():
        if not gpu.isdecimal() or int(gpu) >= len(places):
            raise ValueError(
                f"speeds of {gpu!r}: neither a GPU type ({', '.join(types)}) nor a rank 0..{len(places) - 1}"
            )
        node, index = places[int(gpu)]
        override = node.setdefault("gpus", {}).setdefault(index, {})
        kind = override.get("type") or cluster["node_types"][node["type"]]["gpus"].get("type") or next(iter(types))
        name = f"{kind}, rank {gpu}"
        types[name] = {**(types[kind] or {}), "expert_seconds": curve}
        override |= {"type": name, "speed": relative.get(gpu, 1.0)}
    for kind in cluster["node_types"].values():
        kind["gpus"].setdefault("type", next(iter(types)))
    cluster["nodes"] = nodes


def _relative(speeds: dict[str, Curve], notes: list[str]) -> dict[str, float]:
    """Speed of each GPU at the largest batch that all were measured at; none where there is no such batch."""
    shared = set.intersection(*(set(curve) for curve in speeds.values()))
    if not shared:
        notes.append("speeds: the GPUs were not measured at one batch in common; relative speeds stay 1")
        return {}
    at = max(shared)
    mean = math.fsum(1 / curve[at] for curve in speeds.values()) / len(speeds)
    return {gpu: round(1 / curve[at] / mean, 6) for gpu, curve in speeds.items()}
