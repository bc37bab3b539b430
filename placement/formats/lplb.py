"""LPLB replica maps: per layer, whose expert each copy is, and the slots in the order that `lplb.Planner` has.

LPLB has no file of its own: a `Planner` takes `redundant_to_original` [GPUs of a group, copies per GPU] and sizes, and
keeps `phy2log` [slots]. The j-th copy on GPU i is the j-th expert of GPU `redundant_to_original[i][j]`. Each column is
a permutation, so an expert has two copies at most. Where a GPU has a multiple of as many copies, they form blocks.
Source: github.com/deepseek-ai/LPLB (MIT), lplb/planner.py. Shapes: E experts, G GPUs, P slots.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from routing.ground.files import write_json

from ..contract.plan import Plan
from .reading import read_json, require_complete, table_of_ints

# written into every map; the reader refuses others
FORMAT, VERSION = "lplb_replica_map", 1
SIZES = ("ep_size", "n_routed_experts", "n_logical_routed_experts")
MOST_GPUS = 65_536  # ten times what experts are spread over; a larger number is no cluster
Edges = list[tuple[int, int, int]]
"""Expert, GPU of its original, GPU of its copy."""


def export_lplb(plan: Plan, path: Path) -> None:
    """Write one planner per layer.

    Raises:
        ValueError: if a layer is not made of experts with one or two copies, as many copied ones on each GPU.
    """
    layers = [_layer(plan, layer) for layer in range(plan.num_layers)]
    sizes = dict(zip(SIZES, (plan.cluster.num_gpus, plan.num_slots, plan.num_experts), strict=True))
    write_json(path, {"format": FORMAT, "version": VERSION, **sizes, "layers": layers})


def read_lplb(path: Path) -> tuple[list[list[int]], int]:
    """The experts in the slots of each layer, and the number of GPUs.

    Raises:
        ValueError: with the first thing that a planner would refuse.
    """
    value = read_json(path)
    if not isinstance(value, dict) or (value.get("format"), value.get("version")) != (FORMAT, VERSION):
        raise ValueError(f"{path}: expected version {VERSION} of {FORMAT}")
    sizes: list[Any] = [value.get(name) for name in SIZES]
    if not all(type(size) is int and size > 0 for size in sizes) or sizes[0] > MOST_GPUS:
        raise ValueError(f"{path}: {', '.join(SIZES)} must be positive whole numbers; got {sizes}")
    gpus, slots, experts = sizes
    if slots % gpus or experts % gpus or slots < experts:
        raise ValueError(f"{path}: {slots} slots of {experts} experts do not divide over {gpus} GPUs")
    layers = value.get("layers")
    if not isinstance(layers, list) or not layers or not all(isinstance(one, dict) for one in layers):
        raise ValueError(f"{path}: layers must be a list with one mapping per layer")
    rows = table_of_ints(path, [one.get("phy2log") for one in layers])
    if len(rows[0]) != slots:
        raise ValueError(f"{path}: phy2log must have {slots} slots; got {len(rows[0])}")
    require_complete(path, rows, experts)
    for index, (one, row) in enumerate(zip(layers, rows, strict=True)):
        _expect_copies(path, index, one.get("redundant_to_original"), row, gpus, experts // gpus)
    return rows, gpus


def validate_lplb(path: Path, plan: Plan | None = None) -> None:
    """Read the file as a planner does.

    Raises:
        ValueError: with the first thing that it would refuse, or that differs from `plan`.
    """
    rows, gpus = read_lplb(path)
    if plan is not None and _per_gpu(rows, gpus) != _per_gpu(
        plan.physical_to_logical_LP.tolist(), plan.cluster.num_gpus
    ):
        raise ValueError(f"{path}: the map is not what the plan says")


def _per_gpu(rows: list[list[int]], gpus: int) -> list[list[list[int]]]:
    """Experts of each GPU in each layer; their order within a GPU is the planner's own."""
    return [[sorted(part) for part in np.reshape(row, (gpus, -1)).tolist()] for row in rows]


def _expect_copies(path: Path, layer: int, source: Any, row: list[int], gpus: int, own: int) -> None:
    """Behind its own experts a GPU has copies of the first ones of the GPUs that the map names, in that order."""
    copies = len(row) // gpus - own
    where = f"{path}: layer {layer}"
    if copies == 0 and source == [[]] * gpus:
        return
    table = table_of_ints(path, source)
    size, width = len(table), len(table[0])
    if gpus % size or copies % width:
        raise ValueError(
            f"{where}: redundant_to_original is {size} x {width}; {gpus} GPUs with {copies} copies each must be "
            "multiples of that"
        )
    for column in zip(*table, strict=True):
        if sorted(column) != list(range(size)) or any(gpu == one for gpu, one in enumerate(column)):
            raise ValueError(f"{where}: each column must name every GPU of the group once, and none as its own source")
    slots = np.reshape(row, (gpus, own + copies))
    if copies > own:
        raise ValueError(f"{where}: {copies} copies on each GPU of {own} experts that could be copied")
    for gpu in range(gpus):
        first = gpu // size * size
        wanted = [slots[first + table[gpu - first][place % width], place] for place in range(copies)]
        if slots[gpu, own:].tolist() != wanted:
            raise ValueError(f"{where}: the copies on GPU {gpu} are not those that redundant_to_original names")


def _layer(plan: Plan, layer: int) -> dict[str, Any]:
    row = plan.physical_to_logical_LP[layer].tolist()
    gpus, per_gpu = plan.cluster.num_gpus, plan.slots_per_gpu
    own, copies = plan.num_experts // gpus, (plan.num_slots - plan.num_experts) // gpus
    holders: dict[int, list[int]] = {}
    for slot, expert in enumerate(row):
        holders.setdefault(expert, []).append(slot // per_gpu)
    doubled = {expert: sorted(held) for expert, held in holders.items() if len(held) > 1}
    degree = Counter(gpu for held in doubled.values() for gpu in held)
    is_regular = all(degree[gpu] == 2 * copies for gpu in range(gpus))
    if not is_regular or any(len(set(held)) != 2 or len(held) != 2 for held in doubled.values()):
        raise ValueError(
            f"lplb gives an expert one further copy at most, and each of the {gpus} GPUs {copies} copies and {copies} "
            f"copied experts; layer {plan.layer_ids[layer]} is otherwise: plan with `--solver lplb`"
        )
    columns = _columns(_oriented(doubled), gpus, copies)
    chosen = [{column[expert][0]: expert for expert in column} for column in columns]
    arrived = [{column[expert][1]: expert for expert in column} for column in columns]
    slots: list[int] = []
    for gpu in range(gpus):
        first, last = [of[gpu] for of in chosen], [of[gpu] for of in arrived]
        rest = [expert for expert in row[gpu * per_gpu : (gpu + 1) * per_gpu] if expert not in (*first, *last)]
        slots += [*first, *rest, *last]
    assert len(slots) == (own + copies) * gpus
    sources = [[column[of[gpu]][0] for column, of in zip(columns, arrived, strict=True)] for gpu in range(gpus)]
    return {"redundant_to_original": sources, "phy2log": slots}


def _oriented(doubled: dict[int, list[int]]) -> Edges:
    """Which copy is the original: along closed walks, so that every GPU has as many originals as copies."""
    around: dict[int, list[int]] = {}
    for expert, held in doubled.items():
        for gpu in held:
            around.setdefault(gpu, []).append(expert)
    left, edges = dict(doubled), list[tuple[int, int, int]]()
    for start in around:
        gpu = start
        while around[gpu]:
            expert = around[gpu].pop()
            if expert not in left:
                continue
            one, other = left.pop(expert)
            there = other if gpu == one else one
            edges.append((expert, gpu, there))
            gpu = there
    return edges


def _columns(edges: Edges, gpus: int, copies: int) -> list[dict[int, tuple[int, int]]]:
    """The edges in perfect matchings of originals' GPUs with copies' GPUs: expert -> both, one of each GPU."""
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import maximum_bipartite_matching

    left, columns = list(edges), []
    for _ in range(copies):
        ends = np.array([(there, here) for _, here, there in left])
        graph = csr_array((np.ones(len(left)), (ends[:, 0], ends[:, 1])), shape=(gpus, gpus))
        source_G = maximum_bipartite_matching(graph, perm_type="column")
        column: dict[int, tuple[int, int]] = {}
        for there, here in enumerate(source_G.tolist()):
            edge = next(one for one in left if one[1:] == (here, there))
            left.remove(edge)
            column[edge[0]] = edge[1:]
        columns.append(column)
    return columns
