"""A plain table `request,token,layer,experts`: CSV, JSON lines or Parquet; the format for recorders of one's own.

`request` is any name and may be missing (one request). `token` is the position in the request, `layer` the decoder
layer. `experts` are ids, as `3 17 5`, `3;17;5` or `[3, 17, 5]`. A table with one column per expert (`e1,e2` or
`expert_1,expert_2`) is read too.
"""

import csv
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .reading.opening import MAGIC, binary_kind, bounded, files_of, id_table, json_records, text_lines, wanted, whole
from .reading.recording import ImportOptions, Recording
from .reading.rows import Row, join_rows

NUMBERED = re.compile(r"^(?:e|expert)_?\d+$")
_COLUMNS = "request,token,layer,experts"


def read_table(path: Path, options: ImportOptions) -> Recording:
    """Read the tables of a file or a folder; a request of one name in two files is one request."""
    return join_rows(path, (row for file in files_of(path, "*.csv", "*.jsonl", "*.parquet") for row in _rows(file)))


def _rows(path: Path) -> Iterator[Row]:
    if binary_kind(path) == MAGIC[b"PAR1"]:
        return _parquet(path)
    first = next(text_lines(path), (0, ""))[1]
    return _json(path) if first.startswith(("{", "[")) else _csv(path)


def _csv(path: Path) -> Iterator[Row]:
    lines = list(text_lines(path))
    reader = csv.reader(line for _, line in lines)
    header = [name.strip().lower() for name in next(reader, [])]
    columns = [name for name in header if NUMBERED.match(name)]
    if not {"token", "layer"} <= set(header) or ("experts" in header) == bool(columns):
        raise ValueError(f"{path}: expected the header {_COLUMNS}; got {','.join(header)[:80]!r}")
    for (number, _), cells in zip(lines[1:], reader, strict=False):
        where = f"{path}: line {number}"
        bare = "experts" in header and header[-1] == "experts" and len(cells) > len(header)
        if len(cells) != len(header) and not bare:
            raise ValueError(f"{where}: {len(cells)} cells for {len(header)} columns; put quotes around [3, 17]")
        record = dict(zip(header, cells, strict=False))
        if bare:
            record["experts"] = ",".join(cells[len(header) - 1 :])
        ids = [record[name] for name in columns if record[name].strip()] if columns else record["experts"]
        experts = [int(entry) for entry in _split(ids, where)]
        yield Row(
            record.get("request", ""), _number(record["token"], where), _number(record["layer"], where), experts, where
        )


def _json(path: Path) -> Iterator[Row]:
    for where, record in json_records(path):
        yield _row(record, where)


def _parquet(path: Path) -> Iterator[Row]:
    try:
        from pyarrow import ArrowException, parquet  # type: ignore[import-untyped]
    except ImportError:
        raise ValueError(f"{path}: reading Parquet needs pyarrow; install it, or write the table as CSV") from None
    try:
        table = parquet.read_table(bounded(path))
    except (ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a readable Parquet table: {str(error).splitlines()[0]}") from None
    for number, record in enumerate(table.to_pylist()):
        yield _row(record, f"{path}: row {number}")


def _row(record: dict[str, Any], where: str) -> Row:
    token, layer, ids = wanted(record, where, "token", "layer", "experts")
    experts = id_table(ids, f"{where}, experts", "[K]").tolist()
    return Row(
        str(record.get("request", "")), whole(token, where, "token"), whole(layer, where, "layer"), experts, where
    )


def _split(cells: str | list[str], where: str) -> list[str]:
    words = cells if isinstance(cells, list) else re.split(r"[\s;,]+", cells.strip().strip("[]()").strip())
    words = [word.strip() for word in words if word.strip()]
    if bad := [word for word in words if not re.fullmatch(r"-?\d{1,9}", word)]:
        raise ValueError(f"{where}: experts are ids such as `3 17 5`; got {bad[0]!r}")
    return words


def _number(cell: str, where: str) -> int:
    if not re.fullmatch(r"\s*\d+\s*", cell):
        raise ValueError(f"{where}: token and layer are whole numbers >= 0; got {cell!r}")
    return whole(int(cell), where, "token and layer")
