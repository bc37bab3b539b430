"""What `trace show` prints: load, reuse and locality, layer by layer."""

import json
from collections.abc import Iterator
from typing import Any

from rich.table import Table

from ..ground.terminal import plain_console


def print_report(report: dict[str, Any]) -> None:
    """Print a report of `trace show --json` as tables."""
    console = plain_console()
    console.print(
        f"{report['tokens']} tokens in {report['sequences']} sequences, {report['layers']} MoE layers, "
        f"{report['experts']} experts, top-{report['top_k']}  {json.dumps(report['metadata'])}",
        highlight=False,
    )
    console.print(_balance_table(report))
    console.print(_locality_table(report))
    for table in _locality_tables(report):
        console.print(table)


def _balance_table(report: dict[str, Any]) -> Table:
    table = Table("layer", "max/mean load", "entropy / log E", "dead experts", "median reuse distance")
    for row in report["per_layer"]:
        reuse = row["median_reuse_distance"]
        table.add_row(
            str(row["layer"]),
            f"{row['skew']:.2f}",
            f"{row['entropy']:.3f}",
            str(row["dead_experts"]),
            "-" if reuse is None else f"{reuse:.0f}",
        )
    return table


def _locality_table(report: dict[str, Any]) -> Table:
    """One row per layer, of the window, the ratio and the size nearest to 16 tokens and twice one token's need."""
    windows = list(report["srp"])
    window = "16" if "16" in windows else windows[-1] if windows else None
    ratio = "2" if "2" in report["sch"] else list(report["sch"])[-1]
    size = min(report["hit_rate"], key=lambda size: abs(int(size) - float(ratio) * report["top_k"]))
    columns = ["layer", *([f"SRP, m = {window}"] if window else []), f"SCH, {ratio} x K slots"]
    table = Table(*columns, f"LRU, {size} slots", f"Belady, {size} slots", title=f"per layer, {report['rows']} rows")
    for row in report["per_layer"]:
        values = [row["srp"][window]["f1"]] if window else []
        values += [row["sch"][ratio]["16"], *(row["hit_rate"][size][name] for name in ("lru", "belady"))]
        table.add_row(str(row["layer"]), *(f"{value:.3f}" for value in values))
    return table


def _locality_tables(report: dict[str, Any]) -> Iterator[Table]:
    """All layers together, over the first rows."""
    title = f"all layers, {report['rows']} rows"
    table = Table("window m", "SRP (best F1)", "experts kept / needed", title=title)
    for window, result in report["srp"].items():
        table.add_row(window, f"{result['f1']:.3f}", f"{result['cache_ratio']:.2f}")
    if report["srp"]:
        yield table
    table = Table("cache / one token's need", "SCH, knows 16 tokens", "SCH, knows all", title=title)
    for ratio, rates in report["sch"].items():
        table.add_row(ratio, f"{rates['16']:.3f}", f"{rates['all']:.3f}")
    yield table
    table = Table("slots per layer", "LRU", "most used, filled before the start", "Belady, admits all", title=title)
    for size, rates in report["hit_rate"].items():
        table.add_row(size, *(f"{rates[name]:.3f}" for name in ("lru", "most_used", "belady")))
    yield table
