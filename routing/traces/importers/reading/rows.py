"""Recordings of one row per token and layer: joined into [tokens, layers, K], complete or refused.

The rows may come in any order. Names of requests may be anything; they are numbered as they appear.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ...routing_trace import EMPTY
from .recording import Integer, LeftOut, Recording

REPEATED = "the same request, token, layer and experts once more"
CUT_OFF = "the last token of a request, of which the end of the recording has cut off layers"


class Row(NamedTuple):
    """The experts of one token at one layer; `where` names the line."""

    request: str
    token: int
    layer: int
    experts: list[int]
    where: str


def join_rows(path: Path, rows: Iterable[Row], lines: int | None = None) -> Recording:
    """One recording of all rows.

    Args:
        path: for messages.
        rows: at most one set of experts per request, token and layer; exact repeats are left out.
        lines: lines that the file has, if more than the rows.

    Raises:
        ValueError: if a token has two different sets at one layer, or lacks a layer that others have.
    """
    listed = list(rows)
    if not listed:
        raise ValueError(f"{path}: holds no routed tokens")
    requests = {name: number for number, name in enumerate(dict.fromkeys(row.request for row in listed))}
    key_N3 = np.array([(requests[row.request], row.token, row.layer) for row in listed], np.int64)
    order = np.lexsort((np.arange(len(listed)), key_N3[:, 2], key_N3[:, 1], key_N3[:, 0]))
    is_same = (key_N3[order][1:] == key_N3[order][:-1]).all(axis=1)
    for again, first in zip(order[1:][is_same], order[:-1][is_same], strict=True):
        _expect_repeat(listed[first], listed[again])
    kept = order[np.concatenate([[True], ~is_same])]
    layers, layer_N = np.unique(key_N3[kept, 2], return_inverse=True)
    tokens, token_N = np.unique(key_N3[kept, :2], axis=0, return_inverse=True)
    K = max(max(len(row.experts) for row in listed), 1)
    expert_TLK = np.full((len(tokens), len(layers), K), EMPTY, np.int64)
    has_TL = np.zeros(expert_TLK.shape[:2], bool)
    for index, token, layer in zip(kept, token_N.ravel(), layer_N.ravel(), strict=True):
        experts = listed[index].experts
        expert_TLK[token, layer, : len(experts)] = experts
        has_TL[token, layer] = True
    whole_T = _whole_tokens(path, has_TL, tokens, layers, list(requests), listed[-1])
    return Recording(
        expert_TLK=expert_TLK[whole_T],
        sequence_T=tokens[whole_T, 0],
        position_T=tokens[whole_T, 1],
        layer_ids=tuple(layers.tolist()),
        read={"lines": lines if lines is not None else len(listed), "tokens": len(tokens), "layers": len(layers)},
        left_out=(
            LeftOut(unit="lines", count=int(is_same.sum()), reason=REPEATED),
            LeftOut(unit="tokens", count=int((~whole_T).sum()), reason=CUT_OFF),
        ),
    )


def _expect_repeat(first: Row, again: Row) -> None:
    if first.experts != again.experts:
        raise ValueError(
            f"{again.where}: request {again.request!r}, token {again.token}, layer {again.layer} has experts "
            f"{again.experts}, and had {first.experts} at {first.where}; requests of one name cannot be told apart"
        )


def _whole_tokens(
    path: Path, has_TL: np.ndarray, tokens: Integer, layers: Integer, requests: list[str], last: Row
) -> np.ndarray:
    """Tokens with every layer; the last row's token may be cut off, any other gap is an error."""
    whole_T = np.asarray(has_TL.all(axis=1))
    for index in np.flatnonzero(~whole_T):
        request, token = tokens[index].tolist()
        if (requests[request], token) != (last.request, last.token) or len(tokens) == 1:
            missing = layers[~has_TL[index]].tolist()[:6]
            raise ValueError(
                f"{path}: request {requests[request]!r}, token {token} has no row for layers {missing}, which other "
                "tokens have; a token that skips a layer needs a row without experts"
            )
    return whole_T
