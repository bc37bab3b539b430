"""What `trace show` prints: load, reuse and locality, layer by layer."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from routing.ground.terminal import plain_console

from ..traces import RoutingTrace

# "May bypass": an expert may be read for one token without taking a slot. A cache that computes from its slots cannot.
HIT_RATES = {
    "lru": "LRU",
    "most_used": "most used stay (may bypass)",
    "belady": "Belady (must admit)",
    "belady_bypass": "Belady (may bypass): the bound",
}


def print_import(trace: RoutingTrace, out: Path) -> None:
    """Say what an importer kept of a recording, what it left out and why, and what it had to guess."""
    console = plain_console(soft_wrap=True)
    account = trace.metadata["import"]
    layers = "" if trace.layer_ids is None else f" (decoder layers {_ranges(trace.layer_ids)})"
    lines = [f"read {trace.metadata['source'].partition(':')[0]}: {_counts(account['read'])}"]
    lines += [f"left out {part['count']} {part['unit']}: {part['reason']}" for part in account["left_out"]]
    lines += [f"note: {note}" for note in account["notes"]]
    lines.append(
        f"wrote {out}: {trace.num_tokens} tokens of {account['kept']['requests']} requests, "
        f"{trace.num_layers} MoE layers{layers}, {trace.num_experts} experts, top-{trace.top_k}"
    )
    for line in lines:
        console.print(line, highlight=False, markup=False)


def print_report(report: dict[str, Any]) -> None:
    """Print a report of `trace show --json` as tables."""
    console = plain_console()
    metadata = {name: value for name, value in report["metadata"].items() if name not in ("import", "layer_ids")}
    console.print(
        f"{report['tokens']} tokens in {report['sequences']} sequences, {report['layers']} MoE layers, "
        f"{report['experts']} experts, top-{report['top_k']}  {json.dumps(metadata)}",
        highlight=False,
    )
    console.print(_balance_table(report))
    console.print(_locality_table(report))
    for table in _locality_tables(report):
        console.print(table)


def _layer(report: dict[str, Any], row: dict[str, Any]) -> str:
    """The decoder layer where it was recorded, else the number among MoE layers."""
    ids = report.get("layer_ids")
    return str(row["layer"] if ids is None else ids[row["layer"]])


def _counts(read: dict[str, int]) -> str:
    return ", ".join(f"{count} {unit}" for unit, count in read.items())


def _ranges(numbers: Sequence[int]) -> str:
    """`3-5, 7` for 3, 4, 5, 7."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ", ".join("-".join(map(str, part)) for part in parts)


def _balance_table(report: dict[str, Any]) -> Table:
    table = Table("layer", "max/mean load", "entropy / log E", "dead experts", "median reuse distance")
    for row in report["per_layer"]:
        reuse = row["median_reuse_distance"]
        table.add_row(
            _layer(report, row),
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
        table.add_row(_layer(report, row), *(f"{value:.3f}" for value in values))
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
    table = Table("slots per layer", *HIT_RATES.values(), title=title)
    for size, rates in report["hit_rate"].items():
        table.add_row(size, *(f"{rates[name]:.3f}" for name in HIT_RATES))
    yield table
