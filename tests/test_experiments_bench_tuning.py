"""What `expertier bench finetune` makes of a contestant's steps, by hand, and its two meters of the disk."""

import json

import pytest

from experiments.bench.tuning.bench import COLUMNS, step_row
from experiments.bench.tuning.contestants import kernel_bytes, trace_rows
from experiments.bench.tuning.write_rate import PIECE_BYTES, write_bandwidth


def lap(seconds, own, kernel):
    keys = ("bytes_read", "bytes_written", "kernel_read", "kernel_written")
    return {"seconds": seconds, "loss": seconds} | dict(zip(keys, (*own, *kernel), strict=True))


def test_a_step_beside_its_bound_by_hand():
    laps = [
        lap(9, (0, 0), (0, 0)),
        lap(2, (300, 100), (200, 150)),
        lap(4, (300, 100), (400, 50)),
        lap(3, (300, 100), (350, 100)),
    ]
    row = step_row({"steps": laps, "commit_s": 4}, {"read": 100, "write": 50}, tokens=8)
    # each step pays a quarter of the commit; what the page cache gave and what was read in vain does not count
    assert (row["step_s"], row["p20_s"], row["p80_s"], row["tok_per_s"]) == (4, 3, 5, 2)
    assert (row["bytes_read"], row["bytes_written"]) == (300, 100)
    assert (row["bound_s"], row["share_of_bound"]) == (5, 1.25)
    assert tuple(row) == COLUMNS
    foreign = [lap(1, (None, None), (0, 0)), lap(1, (None, None), (50, 25))]
    row = step_row({"steps": foreign, "commit_s": 0}, {"read": 100, "write": 50}, tokens=8)
    assert row["share_of_bound"] == pytest.approx(1.0)


def test_rows_are_those_of_the_trace(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 70}))
    rows = trace_rows(tmp_path, 32)
    assert rows.token_NS.tolist() == [list(range(32)), list(range(32, 64))]


def test_the_kernel_counts_what_is_written(tmp_path):
    before = kernel_bytes()[1]
    assert write_bandwidth(tmp_path, 2 * PIECE_BYTES) > 0
    if kernel_bytes()[1] == before:
        pytest.skip("temporary files are in memory here")
    assert kernel_bytes()[1] - before >= 2 * PIECE_BYTES
