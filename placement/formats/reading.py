"""Reading exported files back, bounded and without executing anything."""

import json
from pathlib import Path
from typing import Any

MAX_BYTES = 2 << 30


def read_json(path: Path) -> Any:
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path}: larger than {MAX_BYTES} bytes")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not readable as JSON: {error}") from error


def table_of_ints(path: Path, rows: Any) -> list[list[int]]:
    """Rows of equal length of integers >= 0."""
    if not isinstance(rows, list) or not rows or not all(isinstance(row, list) and row for row in rows):
        raise ValueError(f"{path}: expected a table of expert ids")
    if len({len(row) for row in rows}) != 1:
        raise ValueError(f"{path}: all rows must have the same number of slots; got {sorted({len(r) for r in rows})}")
    if not all(type(entry) is int and entry >= 0 for row in rows for entry in row):
        raise ValueError(f"{path}: expert ids must be integers >= 0")
    return rows
