"""What `expertier place run` prints."""

from pathlib import Path
from typing import Any

from rich.table import Table

from routing.ground.quantity import format_size
from routing.ground.terminal import plain_console


def print_plans(found: dict[str, Any]) -> None:
    """One row per plan: predicted or scored, a slash, counted."""
    table = Table("plan", "remote rows", "bytes", "rows saved", "GPUs per token", "balancedness")
    for name, report in found["plans"].items():
        counted, predicted, scored = report["counted"], report["predicted"], report["scored"]
        saved = 1 - counted["remote_rows"] / counted["remote_pairs"] if counted["remote_pairs"] else 0.0
        table.add_row(
            Path(name).name,
            f"{predicted['remote_rows']:,} / {counted['remote_rows']:,}",
            format_size(counted["remote_bytes"]),
            f"{saved:.1%}",
            f"{scored['gpu_fanout']:.3f} / {counted['gpu_fanout']:.3f}",
            f"{scored['balancedness']:.3f} / {counted['balancedness']:.3f}",
        )
    console = plain_console()
    console.print(table)
    worst = max(report["largest_error"] for report in found["plans"].values())
    console.print(
        f"{found['rows']:,} rows on {found['processes']} processes; before a slash as predicted, after it as counted; "
        f"rows saved against one row per expert; outputs equal those of whole experts to {worst:.0e}",
        highlight=False,
    )


def print_staying(found: dict[str, Any]) -> None:
    """A line for each plan whose tokens also stayed where their experts are."""
    for name, report in found["plans"].items():
        if stayed := report.get("staying"):
            home, staying = stayed["home"]["counted"], stayed["staying"]["counted"]
            is_right = "as predicted" if stayed["is_equal"] else "NOT as predicted"
            plain_console().print(
                f"{Path(name).name}: staying, {staying['rows']:,} rows instead of {home['rows']:,}, "
                f"{format_size(staying['bytes'] + stayed['context_bytes'])} instead of {format_size(home['bytes'])} "
                f"({format_size(stayed['context_bytes'])} of it keys and values), {staying['moves']:,} moves, "
                f"home after {len(stayed['home_after'])} layers; {is_right}; outputs equal to {stayed['error']:.0e}",
                highlight=False,
            )


def print_woven(found: dict[str, Any]) -> None:
    """One line, if parts were woven: a run in which their bits differ has failed before."""
    errors = [report["woven"]["error"] for report in found["plans"].values() if "woven" in report]
    if errors:
        plain_console().print(
            f"parts woven, one computed while others were exchanged: bits of one after the other, in {len(errors)} "
            f"plans; outputs equal those of whole experts to {max(errors):.0e}",
            highlight=False,
        )


def print_migration(found: dict[str, Any]) -> None:
    """One line: what moved between forwards."""
    planned = found["planned"]
    plain_console().print(
        f"migration: {found['rounds']} rounds in {found['forwards']} forwards, {found['missed']} missed, outputs equal "
        f"to {found['error']:.0e}; moved {format_size(found['moved_bytes'])} "
        f"(planned {format_size(planned['moved_bytes'])}), "
        f"extra at most {format_size(found['peak_extra_bytes'])} (planned {format_size(planned['peak_extra_bytes'])})",
        highlight=False,
    )
