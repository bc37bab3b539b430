"""The router benchmark measures every contestant and refuses to time a router that routes wrongly."""

import experiments.bench.routers as bench


def test_every_contestant_is_measured(monkeypatch):
    for name, size in (("TOKENS", 64), ("WIDTH", 16), ("EXPERTS", 8), ("TOP_K", 2), ("LAYERS", 2)):
        monkeypatch.setattr(bench, name, size)
    rows = bench.measure(5)
    assert [row["router"] for row in rows] == [bench.PLAIN, bench.PRODUCTS, *bench.MEASURED]
    assert all(0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"] for row in rows)
    assert rows[0]["ratio"] == 1.0
