"""`bench starts` from end to end, on two small texts: what must start equal does, and every command is one row."""

import csv

import pytest

from experiments.bench.starting_points import DENSE_STARTS, TASK_MERGES

pytestmark = pytest.mark.slow


def test_every_start_is_a_row_and_exact_ones_start_where_their_source_is(tmp_path, run):
    texts = [tmp_path / "prose.txt", tmp_path / "numbers.txt"]
    texts[0].write_text("It was a bright cold day in April, and the clocks were striking thirteen. " * 800)
    texts[1].write_text("\n".join(f"{number} * {number} = {number**2}" for number in range(3000)))
    sizes = ("--steps", 4, "--more", 2, "--seeds", 1)
    records = tmp_path / "records"
    options = ("--data", texts[0], "--other", texts[1], *sizes, "--record", "--records", records)
    assert run("bench", "starts", *options) == 0
    (table,) = records.glob("*/result.csv")
    with table.open(encoding="utf-8") as file:
        rows = {(row["start"], row["variant"]): row for row in csv.DictReader(file)}
    assert {variant for start, variant in rows if start == "dense"} >= DENSE_STARTS.keys() | TASK_MERGES.keys()
    bits = {key: float(row["bits_start"]) for key, row in rows.items()}
    for variant in ("copies", "shards"):
        assert bits["dense", variant] == pytest.approx(bits["dense", "dense"], abs=1e-5)
    for variant in ("nulls K=4", "nulls K=3"):
        assert bits["experts", variant] == pytest.approx(bits["experts", "as it is"], abs=1e-5)
        assert float(rows["experts", variant]["load_start"]) == 2.0
    assert bits["dense", "drop 0.5"] != bits["dense", "dense"]
