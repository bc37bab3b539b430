"""Which format a recording has, by its first bytes, its first object, or the names of its arrays."""

import zipfile
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from .reading.opening import MAGIC, binary_kind, bounded, json_records, text_lines
from .sglang_responses import holder_of
from .table import NUMBERED

# a recording may begin with lines about itself
FIRST_RECORDS = 8


@dataclass(frozen=True, kw_only=True)
class Glimpse:
    """The little of a recording that its format can be told by.

    Args:
        kind: what a binary file is, None for text.
        members: names inside a zip archive.
        records: the first JSON objects.
        header: the first line of a text that is not JSON.
    """

    kind: str | None
    members: tuple[str, ...] = ()
    records: tuple[dict[str, Any], ...] = ()
    header: str = ""

    def description(self) -> str:
        """What was found, for messages."""
        if "expert_TLK.npy" in self.members:
            return "a routing trace already"
        if self.members:
            return f"arrays {', '.join(name.removesuffix('.npy') for name in self.members[:6])}"
        if self.kind is not None:
            return self.kind
        if self.records:
            return f"JSON with the keys {', '.join(map(repr, list(self.records[0])[:8]))}"
        return f"text that begins with {self.header[:60]!r}"


def glimpse(path: Path) -> Glimpse:
    """Look at a file, or at the first file of a folder.

    Raises:
        ValueError: if there is nothing to look at.
    """
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
        if not files:
            raise ValueError(f"{path}: an empty folder")
        path = next((file for file in files if file.suffix in (".jsonl", ".pt", ".npz", ".json")), files[0])
    kind = binary_kind(bounded(path))
    if kind == MAGIC[b"PK\x03\x04"]:
        return Glimpse(kind=kind, members=_members(path))
    if kind is not None:
        return Glimpse(kind=kind)
    first = next(text_lines(path), (0, ""))[1]
    if first.startswith(("{", "[")):
        return Glimpse(kind=None, records=tuple(record for _, record in islice(json_records(path), FIRST_RECORDS)))
    return Glimpse(kind=None, header=first)


def fitting_formats(found: Glimpse) -> list[str]:
    """Names of the formats that a recording could have: one, if it is a recording that is known."""
    if found.members:
        return _of_archive(found.members)
    if found.records:
        return next((fitting for record in found.records if (fitting := _of_record(record))), [])
    if found.kind is not None:
        kinds = {"a NumPy array (.npy)": "exflow", "a safetensors file": "hf-logits", "a Parquet table": "table"}
        return [kinds[found.kind]] if found.kind in kinds else []
    names = [name.strip().lower() for name in found.header.split(",")]
    if {"token", "layer"} <= set(names) and ("experts" in names or any(NUMBERED.match(name) for name in names)):
        return ["table"]
    return ["csv"] if names[0] in ("layer", "layer_id") and len(names) == 2 else []


def _members(path: Path) -> tuple[str, ...]:
    try:
        with zipfile.ZipFile(path) as archive:
            return tuple(archive.namelist())
    except zipfile.BadZipFile:
        raise ValueError(f"{path}: a damaged zip archive (.npz or .pt)") from None


def _of_archive(members: tuple[str, ...]) -> list[str]:
    if any(name.endswith("/data.pkl") for name in members):
        return ["sglang"]
    if "routed_experts.npy" in members:
        return ["npz"]
    return [] if "expert_TLK.npy" in members else ["hf-logits"]


def _of_record(record: dict[str, Any]) -> list[str]:
    keys = record.keys()
    if "top_indices" in keys:
        return ["megatron"]
    if {"req_id", "token_idx", "layer"} <= keys:
        return ["vllm-routes"]
    if {"token", "layer", "experts"} <= keys:
        return ["table"]
    choices = record.get("choices", record.get("outputs"))
    listed = choices if isinstance(choices, list) else []
    nested = [record, *(choice for choice in listed if isinstance(choice, dict))]
    if any(holder_of(one) is not None for one in nested):
        return ["sglang"]
    return ["vllm"] if any(key.endswith("routed_experts") for one in nested for key in one) else []
