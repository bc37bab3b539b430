"""How many levels of each expert are read, where a packed copy has them: as many as asked for, or as memory holds.

Source: BitStack (arXiv:2410.23918), whose blocks are sorted by what they gain and read as far as memory goes.

Depths stay as they are chosen here, unless a rule chooses them while the model runs: then memory is divided into places
for first levels and for the others, and divided anew when the budget changes.
"""

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import mul
from pathlib import Path
from typing import Any

from routing.ground.quantity import format_size

from ..cache.depth import DepthChoice
from ..checkpoint.experts import weight_names
from ..formats.form import BLOCK_BYTES, Form
from ..formats.lossy.levelled import LevelledForm
from ..formats.lossy.low_bit import stored_shape
from ..memory.budget import MemoryPlan, bytes_for_experts, spread_slots
from ..ram.bit_router import BitGate, load_router
from ..ram.level_slots import LevelRoom
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
    if options.depth == "all" or options.depth_choice is not None:
        return opened
    if options.depth == "auto":
        depth_LE = depths_in(packed, bytes_for_experts(cpu_limit(options), needs_of(opened, options)))
    else:
        depth_LE = _uniform(packed, int(options.depth))
    read = packed.to_depth(depth_LE)
    return replace(opened, packed=read, forms=read.forms, checksums=read.checksums)


@dataclass(frozen=True, eq=False)
class Deepening:
    """A rule that chooses depths while a model runs, and what there is room for.

    Args:
        choice: name and settings of the rule, such as `hottest:8`.
        packed: the packed copy, with all levels.
        top_k: experts that a token visits in a layer.
        is_fixed: whether slots per layer were given instead of a budget.
        gates: of the bit router, by layer; none without one.
    """

    choice: DepthChoice
    packed: Pack
    top_k: int
    is_fixed: bool
    gates: Mapping[int, BitGate] = field(default_factory=dict)

    @classmethod
    def of(cls, opened: OpenedCheckpoint, options: LoadOptions) -> "Deepening | None":
        """What `options` ask for; None if depths stay as they are.

        Raises:
            ValueError: if a bit router is asked for that is not there, or is another copy's.
        """
        if options.depth_choice is None:
            return None
        assert opened.packed is not None
        assert options.pack is not None
        gates: Mapping[int, BitGate] = {}
        if options.depth_choice.rule == "router":
            forms = opened.packed.forms
            gates = load_router(Path(options.pack), forms, [_width(opened.model, form) for form in forms])
        return cls(options.depth_choice, opened.packed, opened.top_k, options.cache_experts is not None, gates)

    def at_base(self, opened: OpenedCheckpoint) -> OpenedCheckpoint:
        """A checkpoint whose slots hold first levels."""
        depth_LE = [[1] * form.layer.num_experts for form in self.packed.forms]
        forms = [form.base() if isinstance(form, LevelledForm) else form for form in self.packed.forms]
        return replace(opened, forms=forms, checksums=self.packed.to_depth(depth_LE).checksums)

    def rooms(self, plan: MemoryPlan) -> tuple[MemoryPlan, list[LevelRoom]]:
        """Divide a budget into places of each level.

        Where all first levels fit, the others take what is left, those first that gain most for each byte. Otherwise
        every slot has room for all levels.

        Args:
            plan: the budget, and what the process needs besides slots.

        Raises:
            ValueError: if the first levels of one token's experts do not fit.
        """
        forms, counts = self.packed.forms, [form.layer.num_experts for form in self.packed.forms]
        if self.is_fixed:
            return plan, [LevelRoom(n, (n,) * _further(form)) for n, form in zip(plan.num_slots, forms, strict=True)]
        free = plan.room_bytes
        base_L = [form.base().slot_bytes if isinstance(form, LevelledForm) else form.slot_bytes for form in forms]
        least = [min(self.top_k, count) for count in counts]
        if free < (needed := sum(map(mul, least, base_L))):
            raise ValueError(
                f"{format_size(plan.limit_bytes)} leaves {format_size(max(free, 0))} for experts; the first levels of "
                f"one token's take {format_size(needed)}"
            )
        whole_L = [base + _further_bytes(form) for base, form in zip(base_L, forms, strict=True)]
        if sum(map(mul, counts, base_L)) <= free:
            slots, planes_L = counts, self._planes_in(free)
        elif sum(map(mul, least, whole_L)) <= free:
            slots = spread_slots(free, whole_L, counts, least)
            planes_L = [(n,) * _further(form) for n, form in zip(slots, forms, strict=True)]
        else:
            slots = spread_slots(free, base_L, counts, least)
            planes_L = [(0,) * _further(form) for form in forms]
        taken = sum(map(mul, slots, base_L)) + sum(map(_planes_bytes, forms, planes_L))
        rooms = [LevelRoom(n, planes) for n, planes in zip(slots, planes_L, strict=True)]
        return replace(plan, num_slots=tuple(slots), slot_bytes=taken), rooms

    def _planes_in(self, free: int) -> list[tuple[int, ...]]:
        """Places for each level after the first, with all first levels in memory."""
        depth_LE = depths_in(self.packed, free, LevelledForm.level_room)
        return [
            tuple(sum(depth > level for depth in depth_E) for level in range(1, 1 + _further(form)))
            for depth_E, form in zip(depth_LE, self.packed.forms, strict=True)
        ]


def _width(model: Any, form: Form) -> int:
    """Columns of a layer's first product: the model's width."""
    module = model.get_submodule(form.layer.module_name)
    up = next(parameter for parameter in form.layer.parameters if parameter.name == weight_names(module)[0])
    return stored_shape(up, is_transposed=bool(module.is_transposed))[1]


def _further(form: Form) -> int:
    """Levels after the first."""
    return len(form.level_ends) - 1 if isinstance(form, LevelledForm) else 0


def _further_bytes(form: Form) -> int:
    return _planes_bytes(form, (1,) * _further(form))


def _planes_bytes(form: Form, planes: Sequence[int]) -> int:
    """What places of each level after the first take."""
    if not isinstance(form, LevelledForm):
        return 0
    return sum(count * form.level_room(level) for level, count in enumerate(planes, start=1))


def _added_blocks(form: LevelledForm, level: int) -> int:
    """What a level adds to a slot, which is whole blocks."""
    before, after = (-(-end // BLOCK_BYTES) * BLOCK_BYTES for end in form.level_ends[level - 1 : level + 1])
    return after - before


def depths_in(
    packed: Pack, budget_bytes: int, level_bytes: Callable[[LevelledForm, int], int] = _added_blocks
) -> Depths:
    """The levels that fit into memory with all experts, those first that gain most for each byte; at least one each.

    Args:
        packed: with levels.
        budget_bytes: for all experts.
        level_bytes: what a level after the first takes.
    """
    depth_LE = [[1] * len(form.depth_E) if isinstance(form, LevelledForm) else [] for form in packed.forms]
    # records are read by whole blocks
    left = budget_bytes - sum(sum(form.own_slot_bytes) for form in packed.to_depth(depth_LE).forms)
    waiting: list[tuple[float, int, int, int]] = []

    def offer(layer: int, expert: int, depth: int) -> None:
        """Queue an expert's next level by its gain for each byte."""
        form, errors = packed.forms[layer], packed.level_errors[layer][expert]
        if isinstance(form, LevelledForm) and depth < len(errors):
            added = level_bytes(form, depth)
            heapq.heappush(waiting, ((errors[depth] - errors[depth - 1]) / max(added, 1), layer, expert, added))

    for layer, depth_E in enumerate(depth_LE):
        for expert in range(len(depth_E)):
            offer(layer, expert, 1)
    while waiting:
        _, layer, expert, added = heapq.heappop(waiting)
        if added <= left:
            left -= added
            depth_LE[layer][expert] += 1
            offer(layer, expert, depth_LE[layer][expert])
    return depth_LE


def _uniform(packed: Pack, depth: int) -> Depths:
    most = min(len(form.level_ends) for form in packed.forms if isinstance(form, LevelledForm))
    if not 1 <= depth <= most:
        raise ValueError(f"depth must lie between 1 and {most}, the levels of this packed copy; got {depth}")
    return [[depth] * len(form.depth_E) if isinstance(form, LevelledForm) else [] for form in packed.forms]
