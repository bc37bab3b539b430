"""The route-logging patches of vLLM: JSON lines `{"type": "route", "req_id", "token_idx", "layer", "topk_ids"}`.

Some of these patches give every line one `req_id` and count `token_idx` from 0 in each forward pass. Then a pass is the
smallest unit that can be told apart: it counts as a request. The passes that vLLM runs to measure its memory have the
same token in every row and are left out.
"""

from itertools import groupby
from pathlib import Path

from .reading.opening import id_table, json_records, wanted, whole
from .reading.recording import ImportOptions, LeftOut, Recording
from .reading.rows import Row, join_rows

PASSES = "lines of one req_id count tokens anew in each forward pass: each pass counts as one request"
OTHER_TYPE = "lines of another type than route"
WARM_UP = "lines of warm-up passes, whose tokens are all the same"
# Equal experts in so many rows of a pass are no text: vLLM's warm-up passes have max_num_batched_tokens, 2048 or more.
WARM_UP_ROWS = 256


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
    passes = _passes(rows) if _contradict(rows) else []
    kept = [row for one in passes for row in one if not _is_warm_up(one)] or rows
    found = join_rows(path, kept, len(rows) + others)
    left_out = (
        *found.left_out,
        LeftOut(unit="lines", count=others, reason=OTHER_TYPE),
        LeftOut(unit="lines", count=len(rows) - len(kept), reason=WARM_UP),
    )
    notes = (*found.notes, *((PASSES,) if passes else ()))
    return Recording(**{**vars(found), "left_out": left_out, "notes": notes})


def _contradict(rows: list[Row]) -> bool:
    """Whether a token of a request has two sets of experts at one layer."""
    first: dict[tuple[str, int, int], list[int]] = {}
    return any(first.setdefault((row.request, row.token, row.layer), row.experts) != row.experts for row in rows)


def _passes(rows: list[Row]) -> list[list[Row]]:
    """The rows of each forward pass and layer under a name of their own; none if some layer does not count anew."""

    def name(row: Row) -> tuple[str, int]:
        return row.request, row.layer

    passes: list[list[Row]] = []
    for (request, layer), group in groupby(sorted(rows, key=name), key=name):
        runs: list[list[Row]] = []
        for row in group:
            if row.token == 0:
                runs.append([])
            if not runs or row.token != len(runs[-1]):
                return []
            runs[-1].append(Row(f"{request}, pass {len(runs) - 1}", row.token, layer, row.experts, row.where))
        passes += runs
    return passes


def _is_warm_up(rows: list[Row]) -> bool:
    return len(rows) >= WARM_UP_ROWS and all(row.experts == rows[0].experts for row in rows)
