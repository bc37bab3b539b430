"""Files that serving engines load: one module per engine with its exporter and its validator."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from routing.ground.expect import expect_name

from ..contract.plan import Plan
from .extra_layers import with_extra_layers
from .hygon import export_hygon, validate_hygon
from .ktransformers import export_ktransformers, validate_ktransformers
from .lplb import export_lplb, validate_lplb
from .omni import export_omni, validate_omni
from .sglang import export_sglang, export_sglang_count, validate_sglang, validate_sglang_count
from .tensorrt_llm import export_tensorrt_llm, validate_tensorrt_llm
from .vllm import export_vllm, validate_vllm
from .vllm_ascend import export_vllm_ascend, validate_vllm_ascend


@dataclass(frozen=True, kw_only=True)
class Format:
    """How to write a plan for an engine, and how to read the file as the engine does.

    Args:
        export: writes the file.
        validate: reads it as the engine would, and compares it with the plan.
        usage: the engine's flag; `{file}` is the file, `{replicas}` the slots beyond one per expert.
        checked: the version whose source the file was checked against, and what is missing there.
    """

    export: Callable[[Plan, Path], None]
    validate: Callable[[Path, Plan | None], None]
    usage: str
    checked: str


FORMATS: dict[str, Format] = {
    "sglang": Format(
        export=export_sglang,
        validate=validate_sglang,
        usage="--init-expert-location {file} --ep-num-redundant-experts {replicas}, without --enable-eplb",
        checked="SGLang of 2026 (python/sglang/srt/eplb)",
    ),
    "sglang-count": Format(
        export=export_sglang_count,
        validate=validate_sglang_count,
        usage="--init-expert-location {file} --ep-num-redundant-experts {replicas}",
        checked="SGLang of 2026 (python/sglang/srt/eplb)",
    ),
    "tensorrt-llm": Format(
        export=export_tensorrt_llm,
        validate=validate_tensorrt_llm,
        usage="moe_config: {{backend: WideEP, load_balancer: {file}}}",
        checked="TensorRT-LLM 2a595f8 (MoeLoadBalancerConfig)",
    ),
    "vllm-ascend": Format(
        export=export_vllm_ascend,
        validate=validate_vllm_ascend,
        usage='--additional-config \'{{"eplb_config": {{"expert_map_path": "{file}"}}}}\'',
        checked="vllm-ascend 182b75e; its removal is announced for v0.25.1",
    ),
    "vllm": Format(
        export=export_vllm,
        validate=validate_vllm,
        usage='--eplb-config \'{{"num_redundant_experts": {replicas}, "initial_mapping_path": "{file}"}}\'',
        checked="vLLM with pull request 41141; no release of vLLM loads it",
    ),
    "hygon": Format(
        export=export_hygon,
        validate=validate_hygon,
        usage='--eplb-config \'{{"num_redundant_experts": {replicas}, "expert_map_path": "{file}"}}\'',
        checked="the documentation of Hygon's vLLM plugin of 2026 (format version 1)",
    ),
    "lplb": Format(
        export=export_lplb,
        validate=validate_lplb,
        usage="one lplb.Planner per layer of {file} (docs/engines.md)",
        checked="LPLB of 2026 (lplb/planner.py)",
    ),
    "omni": Format(
        export=export_omni,
        validate=validate_omni,
        usage="placement pattern_path: {file} in omni-infer's config.yaml",
        checked="omni-infer c8bc2bb",
    ),
    "ktransformers": Format(
        export=export_ktransformers,
        validate=validate_ktransformers,
        usage="turn {file} into stats.pt (docs/engines.md), then --init-expert-location stats.pt "
        "--kt-expert-placement-strategy frequency --kt-num-gpu-experts N",
        checked="KTransformers of 2026 (kt-kernel)",
    ),
}
# formats that know of experts off the GPUs; they take plans of one machine
WITH_TIERS = ("ktransformers",)
# the other file that `vllm` writes, for names that end in .placement.json
ONE_MAP = Format(
    export=export_vllm,
    validate=validate_vllm,
    usage="--expert-placement-file {file}",
    checked="vLLM with pull request 34811; no release of vLLM loads it",
)


def export_plan(plan: Plan, format_name: str, path: Path, *, extra_layers: int = 0) -> str:
    """Write a plan in an engine's format, validated as the engine would read it before it takes its name.

    Args:
        plan: as solved; its layer numbers become those of the file.
        format_name: a key of FORMATS.
        path: the engine's file.
        extra_layers: further MoE layers behind the decoder, of draft (MTP) modules, in the initial layout.

    Returns:
        How to use the file: the engine's flag, and the version that it was checked with.

    Raises:
        ValueError: if there is no such format or the engine cannot express the plan.
    """
    expect_name(format_name, FORMATS, "format")
    if plan.homes is not None and format_name not in WITH_TIERS:
        raise ValueError(
            f"{format_name} keeps every expert on GPUs, in equal numbers of slots; this plan uses host memory or SSDs: "
            f"export one node of it as {WITH_TIERS[0]} (`expertier place part`), or run it with `expertier generate "
            "--plan --node`"
        )
    if extra_layers and format_name == "lplb":
        raise ValueError("lplb has its own start for layers without loads: a Planner that is told nothing; use 0")
    written = with_extra_layers(plan, extra_layers)
    trial = path.with_name(f".{path.name}.{os.getpid()}{_suffix(path)}")
    try:
        FORMATS[format_name].export(written, trial)
        FORMATS[format_name].validate(trial, written)
        os.replace(trial, path)
    finally:
        trial.unlink(missing_ok=True)
    return how_to_use(plan, format_name, path)


def how_to_use(plan: Plan, format_name: str, path: Path) -> str:
    """The engine's flag for a file, and the version that it was checked with."""
    is_one_map = format_name == "vllm" and path.name.endswith(".placement.json")
    used = ONE_MAP if is_one_map else FORMATS[format_name]
    replicas = max(plan.num_slots - plan.num_experts, 0)
    return f"{used.usage.format(file=path, replicas=replicas)} (checked with {used.checked})"


def _suffix(path: Path) -> str:
    """Some formats look at the whole ending of the name."""
    return "".join(path.suffixes[-2:])
