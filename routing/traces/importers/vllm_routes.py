"""The route-logging patches of vLLM: JSON lines `{"type": "route", "req_id", "token_idx", "layer", "topk_ids"}`."""

from pathlib import Path

from .reading.opening import id_table, json_records, wanted, whole
from .reading.recording import ImportOptions, LeftOut, Recording
from .reading.rows import Row, join_rows


def read_vllm_routes(path: Path, options: ImportOptions) -> Recording:
    """Read one line per token and layer; lines of another type are left out and counted."""
    rows, others = [], 0
    for where, record in json_records(path):
        if record.get("type", "route") != "route":
            others += 1
            continue
        request, token, layer, ids = wanted(record, where, "req_id", "token_idx", "layer", "topk_ids")
        experts = id_table(ids, f"{where}, topk_ids", "[K]").tolist()
        token, layer = whole(token, where, "token_idx"), whole(layer, where, "layer")
        rows.append(Row(str(request), token, layer, experts, where))
    found = join_rows(path, rows, len(rows) + others)
    metadata = LeftOut(unit="lines", count=others, reason="lines of another type than route")
    return Recording(**{**vars(found), "left_out": (*found.left_out, metadata)})
