"""Files that serving engines load: one module per engine with its exporter and its validator."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..contract.plan import Plan
from .ktransformers import export_ktransformers, validate_ktransformers
from .omni import export_omni, validate_omni
from .sglang import export_sglang, export_sglang_count, validate_sglang, validate_sglang_count
from .tensorrt_llm import export_tensorrt_llm, validate_tensorrt_llm
from .vllm import export_vllm, validate_vllm
from .vllm_ascend import export_vllm_ascend, validate_vllm_ascend


@dataclass(frozen=True)
class Format:
    """How to write a plan for an engine, and how to read the file as the engine does."""

    export: Callable[[Plan, Path], None]
    validate: Callable[[Path, Plan | None], None]


FORMATS: dict[str, Format] = {
    "sglang": Format(export_sglang, validate_sglang),
    "sglang-count": Format(export_sglang_count, validate_sglang_count),
    "tensorrt-llm": Format(export_tensorrt_llm, validate_tensorrt_llm),
    "vllm-ascend": Format(export_vllm_ascend, validate_vllm_ascend),
    "vllm": Format(export_vllm, validate_vllm),
    "omni": Format(export_omni, validate_omni),
    "ktransformers": Format(export_ktransformers, validate_ktransformers),
}


def export_plan(plan: Plan, format_name: str, path: Path) -> None:
    """Write a plan in an engine's format, validated as the engine would read it before it takes its name.

    Raises:
        ValueError: if there is no such format or the engine cannot express the plan.
    """
    if format_name not in FORMATS:
        raise ValueError(f"unknown format {format_name!r}; there are {', '.join(FORMATS)}")
    trial = path.with_name(f".{path.name}.{os.getpid()}{_suffix(path)}")
    try:
        FORMATS[format_name].export(plan, trial)
        FORMATS[format_name].validate(trial, plan)
        os.replace(trial, path)
    finally:
        trial.unlink(missing_ok=True)


def _suffix(path: Path) -> str:
    """Some formats look at the whole ending of the name."""
    return "".join(path.suffixes[-2:])
