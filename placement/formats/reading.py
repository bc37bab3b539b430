"""Reading exported files back, bounded and without executing anything."""

import json
from pathlib import Path
from typing import Any

# a map of 61 layers x 10,000 slots has 4 MB; 2 GiB leave room for any cluster and still fit in memory
MAX_BYTES = 2 << 30


def read_json(path: Path) -> Any:
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path}: larger than {MAX_BYTES} bytes")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not readable as JSON: {error}") from error


def require_complete(path: Path, rows: list[list[int]], experts: int | None) -> None:
    """Every row holds every expert 0..experts-1 (or up to the largest id seen) and no other."""
    wanted = set(range(experts if experts is not None else max(map(max, rows)) + 1))
    for index, row in enumerate(rows):
        if set(row) != wanted:
            raise ValueError(f"{path}: row {index} must hold every expert 0..{len(wanted) - 1} and no other")


def table_of_ints(path: Path, rows: Any) -> list[list[int]]:
    """Rows of equal length of integers >= 0."""
    if not isinstance(rows, list) or not rows or not all(isinstance(row, list) and row for row in rows):
        raise ValueError(f"{path}: expected a table of expert ids")
    if len({len(row) for row in rows}) != 1:
        raise ValueError(f"{path}: all rows must have the same number of slots; got {sorted({len(r) for r in rows})}")
    if not all(type(entry) is int and entry >= 0 for row in rows for entry in row):
        raise ValueError(f"{path}: expert ids must be integers >= 0")
    return rows
