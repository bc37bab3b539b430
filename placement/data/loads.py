"""Reading expert loads: JSON with `logical_count`, as SGLang's `--init-expert-location` takes it.

A file may also say which decoder layers its rows are (`layer_ids`), as `expertier place loads` writes it where the
engine recorded the numbers. Shapes: L layers, E experts.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float64]
# 1 GiB of JSON are 200 steps of 61 layers x 256 experts; a recording of more steps is summed first.
MAX_LOADS_BYTES = 1 << 30


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadFile:
    """Loads as read.

    Args:
        load_LE: routed tokens per row and expert, summed over steps.
        layer_ids: decoder layers of all rows, or of the MoE layers among rows that are decoder layers; None if the file
            does not say.
        experts_per_row: entries of each row where rows differ; shorter ones are filled up with 0. None if all agree.
    """

    load_LE: Float
    layer_ids: tuple[int, ...] | None = None
    experts_per_row: tuple[int, ...] | None = None


def read_loads(path: str | os.PathLike[str]) -> Float:
    """Loads [rows, E] from a JSON file `{"logical_count": [[...]]}`; [steps, L, E] is summed over steps.

    Raises:
        ValueError: if the file is missing, too large, or not such a table of finite numbers >= 0.
    """
    return read_load_file(path).load_LE


def read_load_file(path: str | os.PathLike[str]) -> LoadFile:
    """The loads of a file with the layers that it names.

    Raises:
        ValueError: if the file is missing, too large, or not such a table of finite numbers >= 0.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"loads {path}: no such file")
    if file.stat().st_size > MAX_LOADS_BYTES:
        raise ValueError(f"loads {path}: larger than {MAX_LOADS_BYTES} bytes")
    value = _parsed(file)
    if not isinstance(value, dict) or "logical_count" not in value:
        found = f"the keys {list(value)[:8]}" if isinstance(value, dict) else type(value).__name__
        raise ValueError(f'loads {path}: expected {{"logical_count": [[...]]}} with one row per layer; got {found}')
    rows, counts = _filled_up(value["logical_count"])
    load_LE = _table(file, rows)
    ids = _layer_ids(file, value.get("layer_ids"), len(load_LE))
    return LoadFile(load_LE=load_LE, layer_ids=ids, experts_per_row=counts)


def checked_loads(load: Float, where: str) -> Float:
    """Loads [L, E], [steps, L, E] summed over steps.

    Raises:
        ValueError: if the shape is another, or a load is NaN, infinite or negative; the message says where.
    """
    if load.ndim not in (2, 3) or 0 in load.shape:
        raise ValueError(f"{where} must be [layers, experts] or [steps, layers, experts]; got shape {load.shape}")
    bad = ~np.isfinite(load) | (load < 0)
    if bad.any():
        place = np.argwhere(bad)[0]
        axes = ("step", "layer", "expert")[-load.ndim :]
        named = ", ".join(f"{axis} {index}" for axis, index in zip(axes, place.tolist(), strict=True))
        raise ValueError(f"{where} must be finite and not negative; got {load[tuple(place)]} at {named}")
    return np.asarray(load.sum(axis=0) if load.ndim == 3 else load)


def _parsed(file: Path) -> Any:
    with file.open("rb") as opened:
        head = opened.read(4)
    if head[:1] in (b"P", b"\x80") or b"\0" in head:
        raise ValueError(
            f"loads {file}: expected JSON; this is a binary file. Turn an engine's recording into loads with "
            "`expertier place loads`"
        )
    try:
        return json.loads(file.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"loads {file}: not readable as JSON: byte {error.start} is not UTF-8 text") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"loads {file}: not readable as JSON: {error}") from None


def _filled_up(rows: Any) -> tuple[Any, tuple[int, ...] | None]:
    """Rows of numbers made equally long with 0, and how long they were if they differed."""
    if not isinstance(rows, list) or not rows or not all(isinstance(row, list) and row for row in rows):
        return rows, None
    widths = tuple(len(row) for row in rows)
    if len(set(widths)) == 1 or any(isinstance(row[0], list) for row in rows):
        return rows, None
    return [row + [0] * (max(widths) - len(row)) for row in rows], widths


def _table(file: Path, rows: Any) -> Float:
    try:
        load = np.array(rows, np.float64)
    except (TypeError, ValueError):
        widths = sorted({len(row) if isinstance(row, list) else -1 for row in rows} if isinstance(rows, list) else [])
        raise ValueError(
            f"loads {file}: logical_count must be a table of numbers, one row per layer; the rows have {widths[:6]} "
            "entries"
        ) from None
    return checked_loads(load, f"loads {file}: logical_count")


def _layer_ids(file: Path, value: Any, rows: int) -> tuple[int, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not value or not all(type(layer) is int and layer >= 0 for layer in value):
        raise ValueError(f"loads {file}: layer_ids must be a list of decoder layers; got {str(value)[:60]}")
    if value != sorted(set(value)) or (len(value) != rows and value[-1] >= rows):
        raise ValueError(
            f"loads {file}: layer_ids must rise, one per row, or name MoE layers among {rows} rows; got {value[:12]}"
        )
    return tuple(value)
