"""IMPORTERS: the formats of recordings, one row each, and `import_trace`, which reads any of them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...ground.expect import expect_name
from ..routing_trace import EMPTY, RoutingTrace
from .exflow import read_exflow
from .guessing import fitting_formats, glimpse
from .hf_logits import read_hf_logits
from .layer_csv import read_layer_csv
from .megatron import read_megatron
from .npz_routes import read_npz_routes
from .reading.recording import ImportOptions, LeftOut, Recording
from .sglang import read_sglang
from .table import read_table
from .vllm import read_vllm
from .vllm_routes import read_vllm_routes

AUTO = "auto"
# traces hold ids as int16
MOST_EXPERTS = 32767
ZERO = "slots of zero-compute experts, now empty"


@dataclass(frozen=True, kw_only=True)
class Importer:
    """One format of recordings.

    Args:
        name: what `--format` calls it.
        read: its reader.
        reads: the program and the files.
        example: the beginning of such a file, or its arrays.
    """

    name: str
    read: Callable[[Path, ImportOptions], Recording]
    reads: str
    example: str


_ROWS = (
    Importer(
        name="sglang",
        read=read_sglang,
        reads="SGLang's recorder, mode per_token (.pt per rank), or responses with return_routed_experts (JSON)",
        example='{"records": [{"topk_ids_of_layer", "positions", ...}], "last_physical_to_logical_map"}',
    ),
    Importer(
        name="vllm",
        read=read_vllm,
        reads="vLLM's responses with --enable-return-routed-experts (JSON)",
        example='{"choices": [{"routed_experts": "k05VTVBZ..."}], "usage": {"prompt_tokens": 100, ...}}',
    ),
    Importer(
        name="vllm-routes",
        read=read_vllm_routes,
        reads="route-logging patches of vLLM (JSON lines)",
        example='{"type": "route", "req_id": "a", "token_idx": 0, "layer": 3, "topk_ids": [5, 1]}',
    ),
    Importer(
        name="megatron",
        read=read_megatron,
        reads="Megatron's --moe-routing-trace-path (JSON lines, a file per rank)",
        example='{"step": 0, "block": "decoder", "layer": 3, "rank": 0, "num_tokens": 2, "top_indices": [[5, 1], ...]}',
    ),
    Importer(
        name="hf-logits",
        read=read_hf_logits,
        reads="router logits of transformers (.npz or .safetensors); needs top_k",
        example="layer_3 [tokens, experts], layer_4, ...",
    ),
    Importer(
        name="exflow",
        read=read_exflow,
        reads="ExFlow's first choices (.npy)",
        example="[tokens, layers]",
    ),
    Importer(
        name="csv",
        read=read_layer_csv,
        reads="layer_id,expert ids of llama.cpp forks (CSV)",
        example="layer_id,expert_ids / 3,17 5",
    ),
    Importer(
        name="npz",
        read=read_npz_routes,
        reads="routed_experts [tokens, layers, K], a .npz per request",
        example="routed_experts, prompt_token_ids, output_token_ids",
    ),
    Importer(
        name="table",
        read=read_table,
        reads="a plain table request,token,layer,experts (CSV, JSON lines, Parquet)",
        example="request,token,layer,experts / a,0,3,17 5",
    ),
)
IMPORTERS: dict[str, Importer] = {row.name: row for row in _ROWS}


def import_trace(
    path: Path,
    format_name: str = AUTO,
    *,
    num_experts: int | None = None,
    top_k: int | None = None,
    zero_experts: int = 0,
    pipeline_stages: int | None = None,
) -> RoutingTrace:
    """Read a foreign recording as a routing trace.

    Args:
        path: the file, or the folder for formats of several files.
        format_name: a key of IMPORTERS, or `auto` to tell it by the content.
        num_experts: E; None takes what the recording says, or else the largest id plus one.
        top_k: K, for router logits and SGLang's responses only.
        zero_experts: Z; ids E..E+Z-1 compute nothing and become empty slots.
        pipeline_stages: stages of a Megatron run whose layer numbers count from 0 in each.

    Returns:
        The trace, request by request. Its metadata holds `num_experts`, `source`, `import` (what was read, kept and
        left out), and `layer_ids` and `hidden_layers` where the recording tells them.

    Raises:
        ValueError: if the format is unknown, the file does not follow it, or part of it is missing without a reason.
    """
    path = Path(path)
    if format_name != AUTO:
        expect_name(format_name, IMPORTERS, "trace format")
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    options = ImportOptions(
        num_experts=num_experts, top_k=top_k, zero_experts=zero_experts, pipeline_stages=pipeline_stages
    )
    name = guess_format(path) if format_name == AUTO else format_name
    try:
        found = _empty_zero_experts(IMPORTERS[name].read(path, options), options)
        return _as_trace(path, name, found, options)
    except ValueError as error:
        raise ValueError(_explained(path, name, str(error))) from None


def guess_format(path: Path) -> str:
    """The format of a recording, told by its content.

    Raises:
        ValueError: if it is none that is known.
    """
    seen = glimpse(path)
    if fitting := fitting_formats(seen):
        return fitting[0]
    raise ValueError(
        f"{path}: not a recording that is known: {seen.description()}. Say --format if it is one "
        f"({', '.join(IMPORTERS)}), or write it as a table request,token,layer,experts"
    )


def _explained(path: Path, name: str, error: str) -> str:
    """The error with the format that was expected, and the one that the content looks like."""
    try:
        fitting = fitting_formats(glimpse(path))
    except ValueError:
        fitting = []
    hint = f"; by its content it is --format {fitting[0]}" if fitting and name not in fitting else ""
    where = "" if error.startswith(str(path)) else f"{path}: "
    return f"{where}{error} (format {name}: {IMPORTERS[name].reads}{hint})"


def _empty_zero_experts(found: Recording, options: ImportOptions) -> Recording:
    """Ids of zero-compute experts become empty slots."""
    if not options.zero_experts or options.num_experts is None:
        return found
    E = options.num_experts
    is_zero_TLK = (found.expert_TLK >= E) & (found.expert_TLK < E + options.zero_experts)
    slots = LeftOut(unit="slots", count=int(is_zero_TLK.sum()), reason=ZERO)
    changed = {"expert_TLK": np.where(is_zero_TLK, EMPTY, found.expert_TLK), "left_out": (*found.left_out, slots)}
    return Recording(**{**vars(found), **changed, "num_experts": None})


def _as_trace(path: Path, name: str, found: Recording, options: ImportOptions) -> RoutingTrace:
    if not len(found.expert_TLK):
        raise ValueError(f"{path}: holds no routed tokens")
    E, notes = _experts(path, found, options.num_experts)
    report = Recording(**{**vars(found), "notes": (*found.notes, *notes)}).report(E)
    metadata: dict[str, Any] = {"num_experts": E, "source": f"{name}: {path.name}", "import": report}
    if found.layer_ids is not None:
        metadata["layer_ids"] = list(found.layer_ids)
    if found.hidden_layers is not None:
        metadata["hidden_layers"] = found.hidden_layers
    return RoutingTrace(
        expert_TLK=found.expert_TLK.astype(np.int16),
        sequence_T=found.sequence_T.astype(np.int32),
        position_T=None if found.position_T is None else found.position_T.astype(np.int32),
        metadata=metadata,
    )


def _experts(path: Path, found: Recording, said: int | None) -> tuple[int, tuple[str, ...]]:
    """E, and a note if it is a guess."""
    lowest, highest = int(found.expert_TLK.min()), int(found.expert_TLK.max())
    if said is not None and found.num_experts is not None and said != found.num_experts:
        raise ValueError(f"{path}: the recording is of {found.num_experts} experts; num_experts says {said}")
    known = said if said is not None else found.num_experts
    E = known if known is not None else max(highest + 1, 1)
    if highest >= E or lowest < EMPTY:
        hint = "" if lowest < EMPTY else "; ids of zero-compute experts need zero_experts"
        raise ValueError(f"{path}: expert ids {lowest}..{highest} do not fit {E} experts{hint}")
    if E > MOST_EXPERTS:
        raise ValueError(f"{path}: {E} experts; at most {MOST_EXPERTS} are supported")
    guessed = f"the recording does not say how many experts there are: {E}, the largest id plus one, is a guess"
    return E, () if known is not None else (guessed,)
