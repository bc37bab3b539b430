"""Files that serving engines load: one module per engine with its exporter and its validator."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..plan import Plan
from .sglang import export_sglang, validate_sglang


@dataclass(frozen=True)
class Format:
    """How to write a plan for an engine, and how to read the file as the engine does."""

    export: Callable[[Plan, Path], None]
    validate: Callable[[Path, Plan | None], None]


FORMATS: dict[str, Format] = {
    "sglang": Format(export_sglang, validate_sglang),
}


def export_plan(plan: Plan, format_name: str, path: Path) -> None:
    """Write a plan in an engine's format, validated as the engine would read it before it takes its name.

    Raises:
        ValueError: if there is no such format or the engine cannot express the plan.
    """
    if format_name not in FORMATS:
        raise ValueError(f"unknown format {format_name!r}; there are {', '.join(FORMATS)}")
    FORMATS[format_name].export(plan, path)
    FORMATS[format_name].validate(path, plan)
