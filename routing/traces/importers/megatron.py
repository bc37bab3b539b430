"""Megatron `--moe-routing-trace-path`: JSON lines, a file per rank; a line per step, layer, rank and micro-batch.

Requests are not in the file: each step, rank and micro-batch is one. A rank of a later pipeline stage has further
layers of the same tokens; a data-parallel rank has other tokens of the same layers. The tracer takes the layer's number
from the name of its module, which counts from 0 within a stage: with such files, the number of stages has to be said.

Source: megatron/core/transformer/moe/router_trace.py.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .reading.opening import id_table, json_records, wanted, whole
from .reading.recording import ImportOptions, Integer, LeftOut, Recording, one_after_another, unequal

# tables of one rank: per step and layer, one per micro-batch in the order of the file
Steps = dict[int, dict[int, list[Integer]]]
REQUESTS = "requests are not recorded: each step, rank and micro-batch counts as one"
SAME_LAYERS = (
    "ranks with the same layer numbers were taken for data-parallel ones; if the run had pipeline stages, "
    "say how many: --pipeline-stages"
)


def read_megatron(path: Path, options: ImportOptions) -> Recording:
    """Read one file, or the files of all ranks in a folder."""
    ranks: dict[int, Steps] = {}
    lines = drafts = 0
    for rank, step, layer, table in _lines(path):
        lines += 1
        drafts += layer is None
        if layer is not None:
            ranks.setdefault(rank, {}).setdefault(step, {}).setdefault(layer, []).append(table)
    if not ranks:
        raise ValueError(f"{path}: no line of block decoder and stage pre_dispatch among {lines}")
    _expect_all_ranks(path, ranks)
    copies = _drop_copies(ranks)
    stages = _stages(path, ranks, options.pipeline_stages)
    tables = [table for group in zip(*stages, strict=True) for table in _requests(path, list(group))]
    layer_ids = tuple(sorted(layer for stage in stages for layer in _layers(path, stage[0][1])))
    expert_TLK, sequence_T, position_T = one_after_another(tables, str(path))
    notes = [REQUESTS]
    if len(ranks) > 1 and len(stages) == 1:
        notes.append(SAME_LAYERS)
    if copies:
        notes.append(f"{copies} ranks recorded the same as another (tensor parallelism) and are left out")
    return Recording(
        expert_TLK=expert_TLK,
        sequence_T=sequence_T,
        position_T=position_T,
        layer_ids=layer_ids,
        read={"lines": lines, "tokens": len(expert_TLK), "layers": len(layer_ids)},
        left_out=(LeftOut(unit="lines", count=drafts, reason="lines of another block (MTP) or stage"),),
        notes=tuple(notes),
    )


def _lines(path: Path) -> Iterator[tuple[int, int, int | None, Integer]]:
    """Rank, step, layer (None: not of the decoder) and [tokens, K] of each line."""
    for where, record in json_records(path, "*.jsonl"):
        step, layer, rank, tokens, ids = wanted(record, where, "step", "layer", "rank", "num_tokens", "top_indices")
        table = id_table(ids, f"{where}, top_indices", "[tokens, K]")
        if len(table) != tokens or ("topk" in record and table.size and table.shape[1] != record["topk"]):
            raise ValueError(
                f"{where}: top_indices must be [num_tokens, topk] = [{tokens}, {record.get('topk')}]; got {table.shape}"
            )
        is_decoder = (
            record.get("stage", "pre_dispatch") == "pre_dispatch" and record.get("block", "decoder") == "decoder"
        )
        place = whole(rank, where, "rank"), whole(step, where, "step")
        yield *place, whole(layer, where, "layer") if is_decoder else None, table


def _expect_all_ranks(path: Path, ranks: dict[int, Any]) -> None:
    if missing := set(range(max(ranks) + 1)) - ranks.keys():
        raise ValueError(
            f"{path}: has ranks {sorted(ranks)[:8]} and lacks {sorted(missing)[:8]}; "
            "put the files of all ranks into one folder and import the folder"
        )
    beside = [] if path.is_dir() else [file for file in path.parent.glob("router_trace_rank*.jsonl") if file != path]
    if path.name.startswith("router_trace_rank") and beside:
        raise ValueError(f"{path}: one rank of several; {beside[0].name} lies beside it. Import the folder")


def _drop_copies(ranks: dict[int, Steps]) -> int:
    """Remove ranks that recorded exactly what an earlier one did; how many they were."""
    copies = [rank for rank in ranks if any(other < rank and _are_equal(ranks[rank], ranks[other]) for other in ranks)]
    for rank in copies:
        del ranks[rank]
    return len(copies)


def _are_equal(one: Steps, other: Steps) -> bool:
    return one.keys() == other.keys() and all(
        one[step].keys() == other[step].keys()
        and all(
            len(tables) == len(other[step][layer])
            and all(np.array_equal(a, b) for a, b in zip(tables, other[step][layer], strict=True))
            for layer, tables in one[step].items()
        )
        for step in one
    )


def _layers(path: Path, steps: Steps) -> tuple[int, ...]:
    """The layers of a rank, which every step must have."""
    layers = {tuple(sorted(step)) for step in steps.values()}
    if len(layers) != 1:
        few, many = min(layers, key=len), max(layers, key=len)
        raise ValueError(f"{path}: a step has layers {few[:8]}, another {many[:8]}; remove the step that was cut off")
    return layers.pop()


def _stages(path: Path, ranks: dict[int, Steps], num_stages: int | None) -> list[list[tuple[int, Steps]]]:
    """Ranks by pipeline stage, each in order of ranks; layers become those of the whole model."""
    ordered = sorted(ranks.items())
    if num_stages is not None and num_stages > 1 and len({_layers(path, steps) for _, steps in ordered}) < num_stages:
        return _local_stages(path, ordered, num_stages)
    groups: dict[tuple[int, ...], list[tuple[int, Steps]]] = {}
    for rank, steps in ordered:
        groups.setdefault(_layers(path, steps), []).append((rank, steps))
    every = [layer for layers in groups for layer in layers]
    if len(set(every)) != len(every):
        raise ValueError(
            f"{path}: ranks have layers {' and '.join(str(layers[:8]) for layers in groups)}, which overlap; "
            "if they are pipeline stages, whose layers count from 0 each, say pipeline_stages"
        )
    stages = [groups[layers] for layers in sorted(groups)]
    if len({len(stage) for stage in stages}) != 1:
        raise ValueError(f"{path}: the pipeline stages have {[len(stage) for stage in stages]} ranks; some are missing")
    if num_stages not in (None, len(stages)):
        raise ValueError(f"{path}: {len(stages)} pipeline stages by their layers; pipeline_stages says {num_stages}")
    return stages


def _local_stages(path: Path, ordered: list[tuple[int, Steps]], num_stages: int) -> list[list[tuple[int, Steps]]]:
    """Stages whose layers count from 0 each; Megatron gives the first ranks to the first stage."""
    size, rest = divmod(len(ordered), num_stages)
    if rest:
        raise ValueError(f"{path}: {len(ordered)} ranks with own tokens do not divide into {num_stages} stages")
    per_stage = 1 + max(max(_layers(path, steps)) for _, steps in ordered)
    return [
        [(rank, _shifted(steps, per_stage * stage)) for rank, steps in ordered[stage * size : (stage + 1) * size]]
        for stage in range(num_stages)
    ]


def _shifted(steps: Steps, first_layer: int) -> Steps:
    return {step: {first_layer + layer: found for layer, found in layers.items()} for step, layers in steps.items()}


def _requests(path: Path, group: list[tuple[int, Steps]]) -> Iterator[Integer]:
    """`[tokens, layers, K]` of every step and micro-batch of ranks that share their tokens, one per stage."""
    names = " and ".join(str(rank) for rank, _ in group)
    steps = {tuple(sorted(found)) for _, found in group}
    if len(steps) != 1:
        raise ValueError(f"{path}: ranks {names} have different steps; the recording is cut off")
    for step in steps.pop():
        layers = {layer: tables for _, found in group for layer, tables in found[step].items()}
        if len({len(tables) for tables in layers.values()}) != 1:
            raise ValueError(f"{path}: step {step}, ranks {names}: layers have different numbers of micro-batches")
        for tables in zip(*(layers[layer] for layer in sorted(layers)), strict=True):
            if len(shapes := {table.shape for table in tables}) != 1:
                raise unequal(f"{path}: step {step}, ranks {names}", shapes, "[tokens, K] of all layers")
            yield np.stack(tables, axis=1)
