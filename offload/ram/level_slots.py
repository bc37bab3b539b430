"""The RAM slots of one layer whose experts are there to different depths: slots have first levels, planes the others.

A miss reads the first level and as many more as the rule asks for. While nothing else is read, the hottest experts get
deeper, a plane at a time. Memory decides how many places there are for each level.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import torch

from ..cache.catalogue import make_cache
from ..cache.depth import Heat, hottest_first
from ..formats.lossy.levelled import LevelledForm
from ..native.kernel_matrix import KernelMatrix
from ..store.reading import Ticket
from ..store.store import ExpertStore
from .depth_rules import DepthRule
from .planes import Planes
from .slots import LayerSlots, Resident

MOST_COMING = 4
"""Planes of a layer that are on their way at a time though nothing needs them: what is needed waits for those that have
begun. Not tuned."""


@dataclass(frozen=True)
class LevelRoom:
    """What a layer has room for.

    Args:
        num_slots: first levels.
        planes: of each level after the first.
    """

    num_slots: int
    planes: tuple[int, ...]


class LevelSlots(LayerSlots):
    """The RAM slots of one layer whose experts are in levels.

    Args:
        store: where experts are read from; its form of the layer is the `base` of a `LevelledForm`.
        layer: number of the MoE layer.
        room: what there is room for; at least one of each.
        policy: name in CACHES; it decides who keeps a slot.
        rule: how deep experts are to be.
    """

    def __init__(self, store: ExpertStore, layer: int, room: LevelRoom, policy: str, rule: DepthRule) -> None:
        form = store.forms[layer]
        assert isinstance(form, LevelledForm)
        self.levels = form
        self.heat = Heat(form.layer.num_experts)
        self._planes = Planes(store, layer, room.planes, self.heat)
        self._rule = rule
        self.uses: Counter[int] = Counter()
        super().__init__(store, layer, room.num_slots, policy, num_places=form.layer.num_experts)

    def clear(self) -> None:
        super().clear()
        self._planes.clear()
        self._need: dict[int, int] = {}
        self._rows: dict[int, list[int]] = {}
        self._computed: dict[int, int] = {}

    def close(self) -> None:
        super().close()
        self._planes.close()

    def begin(self, x_TD: torch.Tensor, expert_TK: torch.Tensor, weight_TK: torch.Tensor) -> torch.Tensor:
        """Ask the rule how deep the experts of a call are to be; those that it leaves out get nobody's id."""
        self._planes.settle()
        count = self.num_experts
        is_there_E = torch.zeros(count, dtype=torch.bool)
        is_there_E[[expert for expert in self._resident if expert not in self._ahead]] = True
        depth_TK = self._rule.depths(x_TD, expert_TK, weight_TK, is_there_E).clamp_max(self._deepest)
        is_ours_TK = (expert_TK >= 0) & (expert_TK < count)
        kept_TK = torch.where(is_ours_TK & (depth_TK == 0), count, expert_TK)
        expert_N, depth_N = expert_TK[is_ours_TK], depth_TK[is_ours_TK]
        rows_VE = torch.stack(
            [torch.bincount(expert_N[depth_N > level], minlength=count) for level in range(len(self.levels.level_ends))]
        )
        need_E = (rows_VE > 0).sum(0)
        used = need_E.nonzero()[:, 0].tolist()
        self._need = {expert: int(need_E[expert]) for expert in used}
        self._rows = {expert: rows_VE[:, expert].tolist() for expert in used}
        self.heat.note({expert: rows[0] for expert, rows in self._rows.items()})
        self._computed = {}
        if num_skipped := int((depth_N == 0).sum()):
            self.uses[0] += num_skipped
        return kept_TK

    def end(self) -> None:
        """Count the rows that were computed from so many levels."""
        for expert, depth in self._computed.items():
            self.uses[depth] += self._rows[expert][0]

    def deepen(self) -> None:
        """Start to read planes of the hottest experts, behind everything that is needed."""
        most = MOST_COMING - len(self._planes.coming)
        for expert in self.heat.hottest()[: self._rule.num_deep]:
            if most <= 0:
                return
            if expert in self._resident and self._planes.num_started(expert) < len(self._planes.counts):
                most -= self._planes.start_ahead(expert, self._kept(self._need))

    @property
    def _deepest(self) -> int:
        """Levels that there is any room for."""
        counts = self._planes.counts
        return 1 + next((level for level, count in enumerate(counts) if not count), len(counts))

    def capacity(self, experts: Collection[int]) -> int:
        deepest = max((self._need.get(expert, 1) for expert in experts), default=1)
        return min((self.num_slots, *self._planes.counts[: deepest - 1]))

    def holds(self, experts: Collection[int]) -> bool:
        need = Counter(level for expert in experts for level in range(1, self._need.get(expert, 1)))
        enough = all(need[level] <= count for level, count in enumerate(self._planes.counts, start=1))
        return super().holds(experts) and enough

    def is_ready(self, expert: int) -> bool:
        return expert in self._resident and self._planes.num_there(expert) >= self._need.get(expert, 1) - 1

    def has_started(self, expert: int) -> bool:
        return expert in self._resident and self._planes.num_started(expert) >= self._need.get(expert, 1) - 1

    def bytes_of(self, experts: Collection[int]) -> int:
        bounds = (0, *self.levels.level_ends)
        total = 0
        for expert in experts:
            start = 1 + self._planes.num_started(expert) if expert in self._resident else 0
            total += max(bounds[self._need.get(expert, 1)] - bounds[start], 0)
        return total

    def start_reads(
        self, experts: Sequence[int], pinned: Collection[int], landed: "SimpleQueue[Ticket]"
    ) -> dict[int, int]:
        wanted = {expert: self._missing(expert) for expert in experts}
        kept = self._kept({*pinned, *experts})
        for expert, level in hottest_first(wanted, self.heat):
            if level == 0:
                super().start_read(expert, {*pinned, *experts}, landed)
            else:
                self._planes.start(expert, kept, landed)
        return {expert: len(levels) for expert, levels in wanted.items()}

    def settle_ahead(self, needed: Collection[int], landed: "SimpleQueue[Ticket]") -> dict[int, int]:
        coming = super().settle_ahead(needed, landed)
        for expert in needed:
            if hurried := self._planes.hurry(expert, self._need.get(expert, 1) - 1, landed):
                coming[expert] = coming.get(expert, 0) + hurried
        return coming

    def complete(self, expert: int) -> None:
        self._planes.complete(expert, self._need.get(expert, 1) - 1)

    def resize(self, room: LevelRoom) -> None:
        """Hold as much as there is room for from now on; the coldest experts lose planes, and slots."""
        for expert in list(self._ahead):
            self._end_ahead(expert)
        for ticket, _ in list(self._given_up):
            ticket.wait()
        self._reclaim()
        self._planes.wait()
        self._planes.resize(room.planes)
        coldest = sorted(self._resident, key=self.heat.__getitem__)
        for expert in coldest[: max(len(coldest) - room.num_slots, 0)]:
            self.release(expert)
        taken = {resident.slot for resident in self._resident.values()}
        free = [slot for slot in range(room.num_slots) if slot not in taken][::-1]
        for resident in self._resident.values():
            if resident.slot >= room.num_slots:
                self._move(resident, free.pop())
        self._slots.hold(room.num_slots)
        self._free, self.num_slots = free, room.num_slots
        self.cache = make_cache(self._policy, self.num_slots, self.num_experts)
        for expert in sorted(self._resident, key=self.heat.__getitem__):
            self.cache.insert(expert)

    def reset(self) -> None:
        """Set all counts to 0."""
        self.uses.clear()
        self._planes.reset()

    def report(self) -> dict[str, Any]:
        """What there is room for, and how many experts in slots have how many levels."""
        depths = Counter(1 + self._planes.num_there(expert) for expert in self._resident)
        return {"slots": self.num_slots, "planes": list(self._planes.counts), "depths": dict(sorted(depths.items()))}

    @property
    def deepened(self) -> tuple[int, int]:
        """Planes that were read ahead, and their bytes."""
        return self._planes.num_ahead, self._planes.ahead_bytes

    def __getitem__(self, expert: int) -> dict[str, Any]:
        levels = self._used(expert)
        self._computed[expert] = len(levels)
        return self.levels.views_of(levels)

    def matrices(self, expert: int) -> dict[str, tuple[KernelMatrix, ...]]:
        return self.levels.kernel_matrices(self[expert], expert)

    def all_of(self, experts: Collection[int]) -> list[dict[str, tuple[KernelMatrix, ...]]] | None:
        if self._ahead or not self._unproven.isdisjoint(experts) or not all(map(self.is_ready, experts)):
            return None
        return [self.matrices(expert) for expert in experts]

    def _used(self, expert: int) -> list[torch.Tensor]:
        """The levels that an expert is computed from now.

        Raises:
            OSError: if they are damaged.
        """
        base = self._slots.slot(self._resident[expert].slot)[: self.levels.level_ends[0]]
        levels = [base, *self._planes.there(expert)]
        if self._rule.is_exact:
            levels = levels[: self._need.get(expert, 1)]
        self._store.check_levels(self.layer, expert, levels)
        return levels

    def _missing(self, expert: int) -> list[tuple[int, int]]:
        """Levels of an expert that are to be read, and the rows that wait for each."""
        start = 1 + self._planes.num_started(expert) if expert in self._resident else 0
        rows = self._rows.get(expert, [1])
        return [(level, rows[level]) for level in range(start, self._need.get(expert, 1))]

    def _kept(self, experts: Collection[int]) -> Mapping[int, int]:
        """Planes that experts must not lose while a call uses them."""
        return {expert: self._need.get(expert, 1) - 1 for expert in experts}

    def _forget(self, expert: int) -> int:
        self._planes.drop(expert)
        return super()._forget(expert)

    def _move(self, resident: Resident, slot: int) -> None:
        self._slots.slot(slot).copy_(self._slots.slot(resident.slot))
        resident.slot = slot
        resident.weights = self.form.views(self._slots.slot(slot), (0,))
