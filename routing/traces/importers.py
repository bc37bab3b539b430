"""Reading what other programs record: routing traces and expert loads, validated, bounded, never executing code.

Formats: see `IMPORTERS` at the bottom. Torch files are read with `weights_only=True`; only those two need torch.
Shapes: T tokens, L MoE layers, K experts per token, E experts, P physical slots.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .routing_trace import EMPTY, RoutingTrace

MAX_BYTES = 16 << 30
MAX_LINE_BYTES = 256 << 20


def import_trace(
    path: Path, format_name: str, *, num_experts: int | None = None, top_k: int | None = None
) -> RoutingTrace:
    """Read a foreign recording as a routing trace.

    Args:
        path: the file, or the folder for formats of several files.
        format_name: a key of IMPORTERS.
        num_experts: E, where the file does not say; None takes the largest id plus one.
        top_k: K, for router logits only.

    Raises:
        ValueError: if the format is unknown or the file does not follow it.
    """
    if format_name not in IMPORTERS:
        raise ValueError(f"unknown trace format {format_name!r}; there are {', '.join(IMPORTERS)}")
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    try:
        expert_TLK, sequence_T = IMPORTERS[format_name](path, top_k)
    except (KeyError, TypeError, IndexError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a {format_name} recording: {type(error).__name__} {error}") from error
    if not len(expert_TLK):
        raise ValueError(f"{path}: holds no routed tokens")
    highest = int(expert_TLK.max()) + 1
    E = num_experts if num_experts is not None else highest
    if highest > E or int(expert_TLK.min()) < EMPTY:
        raise ValueError(f"{path}: expert ids {int(expert_TLK.min())}..{highest - 1} do not fit {E} experts")
    return RoutingTrace(
        expert_TLK=expert_TLK.astype(np.int16),
        sequence_T=sequence_T.astype(np.int32),
        metadata={"num_experts": E, "source": f"{format_name}: {path.name}"},
    )


Pair = tuple[NDArray[np.int64], NDArray[np.int64]]


def read_vllm_routed_experts(path: Path, top_k: int | None) -> Pair:
    """vLLM `--enable-return-routed-experts`: JSON lines or a list of responses, [tokens, layers, K] per response."""
    tables = []
    for response in _json_records(path):
        for choice in response.get("choices", [response]):
            parts = [choice[key] for key in ("prompt_routed_experts", "routed_experts") if choice.get(key) is not None]
            if parts:
                tables.append(np.concatenate([_table(path, part) for part in parts]))
    return _stack_sequences(path, tables)


def read_megatron_jsonl(path: Path, top_k: int | None) -> Pair:
    """Megatron `--moe-routing-trace-path`: JSONL, or a folder of one file per rank; a line per step, layer and rank."""
    rows: dict[tuple[int, int], dict[int, NDArray[np.int64]]] = {}
    for record in _json_records(path, "*.jsonl"):
        if record.get("stage", "pre_dispatch") != "pre_dispatch" or record.get("block", "decoder") != "decoder":
            continue
        table = np.array(record["top_indices"], np.int64)
        if table.ndim != 2 or len(table) != record["num_tokens"]:
            raise ValueError(f"{path}: top_indices must be [num_tokens, topk]; got {table.shape}")
        rows.setdefault((int(record["step"]), int(record["rank"])), {})[int(record["layer"])] = table
    layers = sorted({layer for row in rows.values() for layer in row})
    tables = []
    for key in sorted(rows):
        if sorted(rows[key]) != layers or len({table.shape for table in rows[key].values()}) != 1:
            raise ValueError(f"{path}: step {key[0]}, rank {key[1]} must have layers {layers}, all of one size")
        tables.append(np.stack([rows[key][layer] for layer in layers], axis=1))
    return _stack_sequences(path, tables)


def read_route_jsonl(path: Path, top_k: int | None) -> Pair:
    """JSON lines `{"type": "route", "req_id", "token_idx", "layer", "topk_ids"}` of the vLLM route-logging patch."""
    token: dict[tuple[str, int], dict[int, list[int]]] = {}
    for record in _json_records(path):
        if record.get("type") == "route":
            key = (str(record["req_id"]), int(record["token_idx"]))
            token.setdefault(key, {})[int(record["layer"])] = list(record["topk_ids"])
    layers = sorted({layer for row in token.values() for layer in row})
    complete = {key: row for key, row in token.items() if len(row) == len(layers)}
    by_request: dict[str, list[tuple[int, list[list[int]]]]] = {}
    for (request, index), row in complete.items():
        by_request.setdefault(request, []).append((index, [row[layer] for layer in layers]))
    return _stack_sequences(path, [_table(path, [row for _, row in sorted(rows)]) for rows in by_request.values()])


def read_exflow_npy(path: Path, top_k: int | None) -> Pair:
    """ExFlow: .npy [tokens, layers] of first choices, made unique by `+ E * layer` or not."""
    table = _load_npy(path)
    if table.ndim != 2 or not np.issubdtype(table.dtype, np.integer):
        raise ValueError(f"{path}: expected integers [tokens, layers]; got {table.dtype} {table.shape}")
    expert_TL = table.astype(np.int64)
    if expert_TL.shape[1] > 1 and (np.diff(expert_TL.min(axis=0)) > 0).all():
        expert_TL = expert_TL - (int(expert_TL.max()) // expert_TL.shape[1] + 1) * np.arange(expert_TL.shape[1])
    return expert_TL[:, :, None], np.zeros(len(expert_TL), np.int64)


def read_csv_routes(path: Path, top_k: int | None) -> Pair:
    """llama.cpp forks: lines `layer_id,expert ids separated by spaces`, all layers of a token in turn."""
    rows: dict[int, list[list[int]]] = {}
    for number, line in enumerate(_lines(path)):
        layer, _, experts = line.partition(",")
        if number == 0 and not layer.strip().isdigit():
            continue
        try:
            rows.setdefault(int(layer), []).append([int(expert) for expert in experts.split()])
        except ValueError:
            raise ValueError(f"{path}: line {number + 1} is not `layer_id,expert ids`: {line[:60]!r}") from None
    if len({len(row) for row in rows.values()}) != 1:
        raise ValueError(f"{path}: layers have different numbers of tokens")
    table = _table(path, [rows[layer] for layer in sorted(rows)])
    return table.transpose(1, 0, 2), np.zeros(table.shape[1], np.int64)


def read_npz_routes(path: Path, top_k: int | None) -> Pair:
    """A folder or file of .npz with `routed_experts [seq, layer, k]`, one request each."""
    files = sorted(path.glob("*.npz")) if path.is_dir() else [path]
    tables = []
    for file in files:
        _bound(file)
        with np.load(file, allow_pickle=False) as archive:
            tables.append(_table(file, archive["routed_experts"]))
    return _stack_sequences(path, tables)


def read_sglang_per_token(path: Path, top_k: int | None) -> Pair:
    """SGLang recorder, mode per_token: .pt, or a folder of them; physical ids become logical ones by its own map."""
    tables, sequences, base = [], [], 0
    for file in sorted(path.glob("*.pt")) if path.is_dir() else [path]:
        value = load_torch(file)
        physical_to_logical_LP = np.asarray(value["last_physical_to_logical_map"], np.int64)
        for record in value["records"]:
            if "topk_ids_of_layer" not in record:
                raise ValueError(f"{file}: records hold no topk_ids_of_layer; record with mode per_token")
            physical_LTK = np.asarray(record["topk_ids_of_layer"], np.int64)
            if physical_LTK.ndim != 3 or physical_LTK.max(initial=-1) >= physical_to_logical_LP.shape[1]:
                raise ValueError(f"{file}: topk_ids_of_layer must be [layers, tokens, K] of physical ids")
            layer = np.arange(len(physical_LTK))[:, None, None]
            logical = physical_to_logical_LP[layer, np.maximum(physical_LTK, 0)]
            logical = np.where(physical_LTK >= 0, logical, EMPTY).transpose(1, 0, 2)
            lengths = record.get("extend_seq_lens") or [1] * len(logical)
            if sum(int(n) for n in lengths) != len(logical):
                lengths = [1] * len(logical)
            tables.append(logical)
            sequences.append(base + np.repeat(np.arange(len(lengths)), [int(n) for n in lengths]))
            base += len(lengths)
    if not tables:
        raise ValueError(f"{path}: holds no records")
    expert_TLK = np.concatenate(tables)
    used = (expert_TLK >= 0).any(axis=(0, 2))
    return expert_TLK[:, used][:, :, (expert_TLK >= 0).any(axis=(0, 1))], np.concatenate(sequences)


def read_router_logits(path: Path, top_k: int | None) -> Pair:
    """Hugging Face `output_router_logits`: .npz or .safetensors of raw logits [tokens, E], one array per sparse layer.

    Plain top-k of the logits; a router that adds a bias or picks groups first (DeepSeek) chose otherwise.
    """
    if top_k is None:
        raise ValueError("router logits do not say how many experts were used; give top_k")
    arrays = _safetensors(path) if path.suffix == ".safetensors" else _npz(path)
    names = sorted(arrays, key=_natural)
    layers = [np.asarray(arrays[name], np.float32).reshape(-1, arrays[name].shape[-1]) for name in names]
    if not layers or len({layer.shape for layer in layers}) != 1 or layers[0].shape[1] < top_k:
        raise ValueError(f"{path}: expected logits [tokens, experts >= {top_k}] of equal shape for every layer")
    chosen = [np.argsort(-layer, axis=1, kind="stable")[:, :top_k] for layer in layers]
    return np.stack(chosen, axis=1).astype(np.int64), np.zeros(len(layers[0]), np.int64)


def load_torch(path: Path) -> Any:
    """A .pt file without running code from it; tensors come back as torch tensors."""
    import torch

    _bound(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path}: not a torch file of plain tensors: {type(error).__name__}") from error


def _json_records(path: Path, pattern: str = "*.json*") -> Iterator[dict[str, Any]]:
    for file in sorted(path.glob(pattern)) if path.is_dir() else [path]:
        text_start = next(iter(_lines(file)), "")
        if text_start.lstrip().startswith("[") or file.suffix == ".json":
            value = json.loads(file.read_text(encoding="utf-8"))
            yield from value if isinstance(value, list) else [value]
        else:
            yield from (json.loads(line) for line in _lines(file))


def _lines(path: Path) -> Iterator[str]:
    _bound(path)
    with path.open(encoding="utf-8") as file:
        while line := file.readline(MAX_LINE_BYTES):
            if line.strip():
                yield line.strip()


def _bound(path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path}: larger than {MAX_BYTES} bytes")


def _table(path: Path, rows: Any) -> NDArray[np.int64]:
    try:
        table = np.array(rows)
    except ValueError as error:
        raise ValueError(f"{path}: rows of unequal length: {error}") from error
    if table.ndim != 3 or not np.issubdtype(table.dtype, np.integer):
        raise ValueError(f"{path}: expected integers [tokens, layers, K]; got {table.dtype} {table.shape}")
    return table.astype(np.int64)


def _stack_sequences(path: Path, tables: list[NDArray[np.int64]]) -> Pair:
    if not tables:
        raise ValueError(f"{path}: holds no routed tokens")
    if len({table.shape[1:] for table in tables}) != 1:
        raise ValueError(f"{path}: sequences differ in [layers, K]: {sorted({t.shape[1:] for t in tables})}")
    return np.concatenate(tables), np.repeat(np.arange(len(tables)), [len(table) for table in tables])


def _load_npy(path: Path) -> NDArray[Any]:
    _bound(path)
    try:
        return np.asarray(np.load(path, allow_pickle=False))
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path}: not a readable .npy: {error}") from error


def _npz(path: Path) -> dict[str, NDArray[Any]]:
    _bound(path)
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def _safetensors(path: Path) -> dict[str, NDArray[Any]]:
    from safetensors.numpy import load_file

    _bound(path)
    return dict(load_file(path))


def _natural(name: str) -> tuple[int, str]:
    digits = "".join(character for character in name if character.isdigit())
    return (int(digits) if digits else 0, name)


IMPORTERS: dict[str, Callable[[Path, int | None], Pair]] = {
    "sglang": read_sglang_per_token,
    "vllm": read_vllm_routed_experts,
    "vllm-routes": read_route_jsonl,
    "megatron": read_megatron_jsonl,
    "hf-logits": read_router_logits,
    "exflow": read_exflow_npy,
    "csv": read_csv_routes,
    "npz": read_npz_routes,
}
