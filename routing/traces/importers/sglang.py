"""SGLang's expert distribution recorder, mode per_token: .pt files, one per rank; or responses of its server (JSON).

A record is one forward pass: `topk_ids_of_layer [decoder layers, tokens, K]` of physical ids, which the file's own map
makes logical. Ranks that saw the same tokens (tensor parallelism) are one; ranks with tokens of their own
(data-parallel attention) are joined. Layers without a routed token are dense or idle; the others keep their numbers.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..routing_trace import EMPTY
from .reading.arrays import load_torch
from .reading.opening import binary_kind, files_of, id_table, wanted, whole
from .reading.recording import ImportOptions, Integer, LeftOut, Recording
from .sglang_requests import RequestFinder
from .sglang_responses import read_sglang_responses

# numbers of SGLang's ForwardMode; in 5 and 6 the rows are a draft's tree, not tokens of the text
SPECULATIVE = (5, 6)
TOKENS, MAP = "topk_ids_of_layer", "last_physical_to_logical_map"


@dataclass(frozen=True, kw_only=True, eq=False)
class _Rank:
    """What one rank recorded: logical ids, the request and the position of each row."""

    expert_TLK: Integer
    request_T: Integer
    position_T: Integer
    next_request: int
    ambiguous: int


def read_sglang(path: Path, options: ImportOptions) -> Recording:
    """Read a file or the files of all ranks in a folder; text is read as responses."""
    files = files_of(path, "*.pt", "*.json*")
    if binary_kind(files[0]) is None:
        return read_sglang_responses(path, options)
    dumps = [(file, _dump(file)) for file in files if file.suffix != ".json"]
    by_rank = _by_rank(path, dumps)
    experts = {
        int(id_table(dump[MAP], f"{file}, {MAP}", "[layers, slots]").max(initial=-1)) + 1 for file, dump in dumps
    }
    if len(experts) != 1:
        raise ValueError(f"{path}: the ranks' maps name different numbers of experts: {sorted(experts)}")
    distinct = _distinct_ranks(by_rank)
    ranks: list[_Rank] = []
    for records in distinct:
        ranks.append(_read_rank(records, ranks[-1].next_request if ranks else 0))
    return _joined(path, ranks, experts.pop(), sum(map(len, by_rank.values())), len(by_rank) - len(distinct))


def _joined(path: Path, ranks: list[_Rank], experts: int, passes: int, copies: int) -> Recording:
    if len({rank.expert_TLK.shape[1:] for rank in ranks}) != 1:
        raise ValueError(f"{path}: the ranks differ in [layers, K]: {[rank.expert_TLK.shape[1:] for rank in ranks]}")
    expert_TLK = np.concatenate([rank.expert_TLK for rank in ranks])
    request_T, position_T = (
        np.concatenate([getattr(rank, name) for rank in ranks]) for name in ("request_T", "position_T")
    )
    if not len(expert_TLK):
        raise ValueError(f"{path}: holds no routed tokens")
    has_layer_L = (expert_TLK != EMPTY).any(axis=(0, 2))
    has_slot_K = (expert_TLK != EMPTY).any(axis=(0, 1))
    if not has_layer_L.any():
        raise ValueError(f"{path}: no layer routed a token")
    order = np.lexsort((np.arange(len(request_T)), request_T))
    idle = LeftOut(unit="layers", count=int((~has_layer_L).sum()), reason="dense or idle layers: no token routed")
    unclear = sum(rank.ambiguous for rank in ranks)
    notes = ["rows are ordered request by request, as positions tell which row continues which request"]
    notes += [f"{unclear} rows could continue several requests of one length; the first was taken"] if unclear else []
    notes += [f"{copies} ranks recorded the same tokens as another and are left out"] if copies else []
    return Recording(
        expert_TLK=expert_TLK[order][:, has_layer_L][:, :, has_slot_K],
        sequence_T=request_T[order],
        position_T=position_T[order],
        layer_ids=tuple(np.flatnonzero(has_layer_L).tolist()),
        hidden_layers=len(has_layer_L),
        num_experts=experts,
        read={"lines": passes, "tokens": len(expert_TLK), "layers": len(has_layer_L)},
        left_out=(idle,),
        notes=tuple(notes),
    )


def _dump(file: Path) -> dict[str, Any]:
    dump = load_torch(file)
    if not isinstance(dump, dict):
        raise ValueError(f"{file}: expected a dictionary with 'records'; got {type(dump).__name__}")
    if "logical_count" in dump:
        raise ValueError(f"{file}: holds expert loads, not tokens; read it with `expertier place loads`")
    records, _ = wanted(dump, str(file), "records", MAP)
    if not isinstance(records, list) or not records:
        raise ValueError(f"{file}: holds no records")
    for record in records:
        if not isinstance(record, dict) or TOKENS not in record:
            raise ValueError(f"{file}: records without {TOKENS!r}; record with mode per_token")
    return dump


def _by_rank(path: Path, dumps: list[tuple[Path, dict[str, Any]]]) -> dict[int, list[dict[str, Any]]]:
    """Passes of each rank with logical ids; a rank without the others is refused."""
    ranks: dict[int, list[dict[str, Any]]] = {}
    for file, dump in dumps:
        map_LP = id_table(dump[MAP], f"{file}, {MAP}", "[layers, slots]")
        for number, record in enumerate(dump["records"]):
            place = f"{file}, record {number}"
            logical = _logical(record[TOKENS], map_LP, place)
            ranks.setdefault(whole(record.get("rank") or 0, place, "rank"), []).append(
                {**record, TOKENS: logical, "place": place}
            )
    expected = set(range(max(ranks) + 1))
    if missing := expected - ranks.keys():
        raise ValueError(
            f"{path}: has the tokens of ranks {sorted(ranks)} and lacks those of {sorted(missing)[:8]}; "
            "put the files of all ranks into one folder and import the folder"
        )
    if not path.is_dir() and (others := ranks_beside(path)):
        raise ValueError(f"{path}: one rank of several; {others[0].name} lies beside it. Import the folder")
    return ranks


def ranks_beside(path: Path) -> list[Path]:
    """Files beside this one with the same name but for the rank at its end."""
    stem, separator, rank = path.stem.rpartition("_")
    if not separator or not rank.isdecimal() or len(rank) > 4:
        return []
    beside = [file for file in path.parent.glob(f"*{path.suffix}") if file != path]
    return [
        file for file in beside if file.stem.rpartition("_")[0] == stem and file.stem.rpartition("_")[2].isdecimal()
    ]


def _logical(value: Any, map_LP: Integer, place: str) -> Integer:
    """Logical ids `[tokens, layers, K]` of one pass."""
    physical_LTK = id_table(value, f"{place}, {TOKENS}", "[layers, tokens, K]")
    if len(physical_LTK) != len(map_LP):
        raise ValueError(f"{place}: {TOKENS} has {len(physical_LTK)} layers, the map {len(map_LP)}")
    if physical_LTK.max(initial=-1) >= map_LP.shape[1]:
        raise ValueError(f"{place}: expert id {physical_LTK.max()} in {TOKENS}; there are {map_LP.shape[1]} slots")
    layer_L11 = np.arange(len(map_LP))[:, None, None]
    logical = np.where(physical_LTK >= 0, map_LP[layer_L11, np.maximum(physical_LTK, 0)], EMPTY)
    return np.asarray(logical.transpose(1, 0, 2))


def _distinct_ranks(by_rank: dict[int, list[dict[str, Any]]]) -> list[list[dict[str, Any]]]:
    """The passes of every rank that has tokens of its own."""
    distinct: list[list[dict[str, Any]]] = []
    for rank in sorted(by_rank):
        passes = sorted(by_rank[rank], key=_pass_number)
        if not any(_are_equal(passes, other) for other in distinct):
            distinct.append(passes)
    return distinct


def _pass_number(record: dict[str, Any]) -> int:
    return whole(record.get("forward_pass_id") or 0, record["place"], "forward_pass_id")


def _are_equal(passes: list[dict[str, Any]], others: list[dict[str, Any]]) -> bool:
    return len(passes) == len(others) and all(
        np.array_equal(one[TOKENS], other[TOKENS]) for one, other in zip(passes, others, strict=True)
    )


def _read_rank(records: list[dict[str, Any]], first_request: int) -> _Rank:
    finder = RequestFinder(first_request)
    request_T: list[int] = []
    position_T: list[int] = []
    for record in records:
        tokens, place = len(record[TOKENS]), record["place"]
        if record.get("forward_mode") in SPECULATIVE:
            raise ValueError(f"{place}: a pass of speculative decoding; record without it")
        lengths = _lengths(record, tokens)
        positions = _positions(record, tokens, lengths)
        position_T += positions
        request_T += finder.decode(positions) if lengths is None else finder.prefill(lengths, positions)
    return _Rank(
        expert_TLK=np.concatenate([record[TOKENS] for record in records]),
        request_T=np.array(request_T, np.int64),
        position_T=np.array(position_T, np.int64),
        next_request=finder.count,
        ambiguous=finder.ambiguous,
    )


def _lengths(record: dict[str, Any], tokens: int) -> list[int] | None:
    """Rows of each request of a prefill; None for a decode pass."""
    value = record.get("extend_seq_lens")
    if value is None:
        return None
    lengths: list[int] = id_table(value, f"{record['place']}, extend_seq_lens", "[requests]").tolist()
    if not lengths:
        return None
    if sum(lengths) != tokens or min(lengths) < 1:
        raise ValueError(f"{record['place']}: extend_seq_lens {lengths[:8]} do not add up to {tokens} tokens")
    return lengths


def _positions(record: dict[str, Any], tokens: int, lengths: list[int] | None) -> list[int]:
    value = record.get("positions")
    if value is None:
        if lengths is None:
            raise ValueError(f"{record['place']}: a decode pass without positions; its requests cannot be told apart")
        return [position for length in lengths for position in range(length)]
    positions = id_table(value, f"{record['place']}, positions", "[tokens]").tolist()
    if len(positions) != tokens:
        raise ValueError(f"{record['place']}: {len(positions)} positions for {tokens} tokens")
    return positions
