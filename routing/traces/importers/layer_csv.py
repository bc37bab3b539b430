"""CSV `layer_id,expert ids` that forks of llama.cpp write: a line per token and layer, tokens of a layer in order."""

import re
from pathlib import Path

import numpy as np

from ..routing_trace import EMPTY
from .reading.opening import text_lines
from .reading.recording import ImportOptions, Recording

# layers and ids have at most five; nine fit into int32
MOST_DIGITS = 9
ONE_REQUEST = "the format does not name requests: all rows are one request"


def read_layer_csv(path: Path, options: ImportOptions) -> Recording:
    """Read the file; every layer needs the same number of tokens."""
    rows: dict[int, list[list[int]]] = {}
    lines = 0
    for place, line in text_lines(path):
        layer, _, experts = line.partition(",")
        if not lines and not layer.strip().isdecimal():
            _expect_header(path, line)
            continue
        if not layer.strip().isdecimal() or not re.fullmatch(r'[\s"]*(\d+[\s"]*)+', experts):
            raise ValueError(f"{path}: line {place} must be `layer_id,expert ids` such as `3,17 5`; got {line[:60]!r}")
        lines += 1
        if len(max(re.findall(r"\d+", line), key=len)) > MOST_DIGITS:
            raise ValueError(f"{path}: line {place} has a number too large for a layer or an expert: {line[:60]!r}")
        rows.setdefault(int(layer), []).append([int(word) for word in re.findall(r"\d+", experts)])
    layers = sorted(rows)
    if not layers:
        raise ValueError(f"{path}: holds no routed tokens")
    counts = {len(table) for table in rows.values()}
    if len(counts) != 1:
        listed = ", ".join(f"layer {each}: {len(rows[each])}" for each in layers[:6])
        raise ValueError(f"{path}: layers have different numbers of tokens ({listed}); the recording is cut off")
    T, K = counts.pop(), max(len(row) for table in rows.values() for row in table)
    expert_TLK = np.full((T, len(layers), K), EMPTY, np.int64)
    for index, number in enumerate(layers):
        for token, ids in enumerate(rows[number]):
            expert_TLK[token, index, : len(ids)] = ids
    return Recording(
        expert_TLK=expert_TLK,
        sequence_T=np.zeros(T, np.int64),
        layer_ids=tuple(layers),
        read={"lines": lines, "tokens": T, "layers": len(layers)},
        notes=(ONE_REQUEST,),
    )


def _expect_header(path: Path, line: str) -> None:
    if not re.fullmatch(r"layer(_id)?\s*,\s*expert(_id)?s?", line.strip(), re.IGNORECASE):
        hint = "; this looks like --format table" if "token" in line.lower() else ""
        raise ValueError(f"{path}: expected the header layer_id,expert_ids; got {line[:60]!r}{hint}")
