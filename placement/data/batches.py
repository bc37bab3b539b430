"""Batches as an engine forms them from traced traffic, and how many rows each expert gets in each of them.

Shapes: A batches, T tokens, L layers, K experts per token, E experts.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from routing.traces import RoutingTrace

Integer = NDArray[np.int64]
CHUNK_CELLS = 1 << 24  # counts per table, 128 MiB as int64; smaller tables only mean more calls


def decode_batches(trace: RoutingTrace, size: int) -> Integer:
    """Rows of the decode steps under continuous batching: `size` lanes, each one token per step.

    Sequences go in order to the lane that is free first, so a batch holds tokens of `size` sequences. With fewer
    sequences than lanes, the traffic is cut into `size` equal parts, one for each lane.

    Args:
        trace: rows of a sequence are in decode order.
        size: tokens of a step, at most the tokens of the trace.

    Returns:
        [A, size] row numbers; the last steps, in which a lane is empty, are left out.

    Raises:
        ValueError: if the trace has fewer tokens than one batch.
    """
    _expect_batch(trace, size)
    sequences, count = np.unique(trace.sequence_T, return_counts=True)
    if len(sequences) < size:
        steps = trace.num_tokens // size
        return np.arange(steps * size).reshape(size, steps).T
    order = np.argsort(trace.sequence_T, kind="stable")
    ends = np.cumsum(count)
    lanes: list[list[int]] = [[] for _ in range(size)]
    length = np.zeros(size, np.int64)
    for index in np.argsort(_first_rows(trace), kind="stable").tolist():
        lane = int(length.argmin())
        lanes[lane].append(index)
        length[lane] += count[index]
    rows = [np.concatenate([order[ends[i] - count[i] : ends[i]] for i in lane]) for lane in lanes]
    steps = min(map(len, rows))
    return np.stack([lane_rows[:steps] for lane_rows in rows], axis=1)


def traffic_batches(trace: RoutingTrace, size: int) -> Integer:
    """Rows of consecutive tokens, `size` at a time, as prefill chunks take them; an incomplete last one is left out.

    Args:
        trace: rows in traffic order.
        size: tokens of a chunk, at most the tokens of the trace.

    Raises:
        ValueError: if the trace has fewer tokens than one batch.
    """
    _expect_batch(trace, size)
    whole = trace.num_tokens // size * size
    return np.arange(whole).reshape(-1, size)


def spread(batch_AT: Integer, most: int) -> Integer:
    """At most so many of the batches, evenly spaced over the traffic."""
    if len(batch_AT) <= most:
        return batch_AT
    return batch_AT[np.linspace(0, len(batch_AT) - 1, most).round().astype(np.int64)]


def count_rows_AE(trace: RoutingTrace, batch_AT: Integer, layer: int) -> Integer:
    """Rows that each expert of a layer gets in each batch, [A, E]; empty slots do not count."""
    E = trace.num_experts
    expert_TK = trace.expert_TLK[:, layer].astype(np.int64)
    found = np.empty((len(batch_AT), E), np.int64)
    for part in _parts(len(batch_AT), batch_AT.shape[1] * trace.top_k + E):
        expert_AN = expert_TK[batch_AT[part]].reshape(len(batch_AT[part]), -1)
        keyed = (expert_AN + np.arange(len(expert_AN))[:, None] * E)[expert_AN >= 0]
        found[part] = np.bincount(keyed, minlength=len(expert_AN) * E).reshape(-1, E)
    return found


def _parts(rows: int, width: int) -> Iterator[slice]:
    step = max(1, CHUNK_CELLS // max(width, 1))
    return (slice(start, start + step) for start in range(0, rows, step))


def _first_rows(trace: RoutingTrace) -> Integer:
    """The first row of each sequence: the order in which sequences arrive."""
    _, first = np.unique(trace.sequence_T, return_index=True)
    return np.asarray(first)


def _expect_batch(trace: RoutingTrace, size: int) -> None:
    if size < 1 or trace.num_tokens < size:
        raise ValueError(f"a batch of {size} tokens needs a trace of as many; it has {trace.num_tokens}")
