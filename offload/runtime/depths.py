"""How many levels of each expert are read, where a packed copy has them: as many as asked for, or as memory holds.

Source: BitStack (arXiv:2410.23918), whose blocks are sorted by what they gain and read as far as memory goes.
"""

import heapq
from collections.abc import Sequence
from dataclasses import replace

from ..formats.form import BLOCK_BYTES
from ..formats.levelled import LevelledForm
from ..memory.budget import bytes_for_experts
from ..store.packing import Pack
from .division import cpu_limit, needs_of
from .opening import OpenedCheckpoint
from .options import LoadOptions

Depths = list[list[int]]
"""Levels of each expert of each layer; empty for layers that have none."""


def with_depth(opened: OpenedCheckpoint, options: LoadOptions) -> OpenedCheckpoint:
    """A checkpoint whose experts are read as deep as `options.depth` says.

    Raises:
        ValueError: if it has no levels, or not so many.
    """
    packed = opened.packed
    if packed is None or not packed.has_levels:
        if options.depth != "all":
            raise ValueError(
                f"depth={options.depth!r} is for packed copies in levels (`expertier pack --form planes` or residual)"
            )
        return opened
    if options.depth == "all":
        return opened
    if options.depth == "auto":
        depth_LE = depths_in(packed, bytes_for_experts(cpu_limit(options), needs_of(opened, options)))
    else:
        depth_LE = _uniform(packed, int(options.depth))
    read = packed.to_depth(depth_LE)
    return replace(opened, packed=read, forms=read.forms, checksums=read.checksums)


def depths_in(packed: Pack, budget_bytes: int) -> Depths:
    """The levels that fit into memory with all experts, those first that gain most for each byte; at least one each.

    Args:
        packed: with levels.
        budget_bytes: for all experts.
    """
    depth_LE = [[1] * len(form.depth_E) if isinstance(form, LevelledForm) else [] for form in packed.forms]
    # records are read by whole blocks
    left = budget_bytes - sum(sum(form.own_slot_bytes) for form in packed.to_depth(depth_LE).forms)
    waiting: list[tuple[float, int, int]] = []
    for layer, depth_E in enumerate(depth_LE):
        for expert in range(len(depth_E)):
            _offer(waiting, packed, layer, expert, 1)
    while waiting:
        _, layer, expert = heapq.heappop(waiting)
        depth = depth_LE[layer][expert]
        added = _blocks(packed, layer, depth + 1) - _blocks(packed, layer, depth)
        if added <= left:
            left -= added
            depth_LE[layer][expert] += 1
            _offer(waiting, packed, layer, expert, depth + 1)
    return depth_LE


def _uniform(packed: Pack, depth: int) -> Depths:
    most = min(len(form.level_ends) for form in packed.forms if isinstance(form, LevelledForm))
    if not 1 <= depth <= most:
        raise ValueError(f"depth must lie between 1 and {most}, the levels of this packed copy; got {depth}")
    return [[depth] * len(form.depth_E) if isinstance(form, LevelledForm) else [] for form in packed.forms]


def _offer(waiting: list[tuple[float, int, int]], packed: Pack, layer: int, expert: int, depth: int) -> None:
    """Queue an expert's next level by its gain for each byte."""
    errors: Sequence[float] = packed.level_errors[layer][expert]
    if depth < len(errors):
        added = max(_blocks(packed, layer, depth + 1) - _blocks(packed, layer, depth), 1)
        heapq.heappush(waiting, ((errors[depth] - errors[depth - 1]) / added, layer, expert))


def _blocks(packed: Pack, layer: int, depth: int) -> int:
    form = packed.forms[layer]
    assert isinstance(form, LevelledForm)
    return -(-form.level_ends[depth - 1] // BLOCK_BYTES) * BLOCK_BYTES
