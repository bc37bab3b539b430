"""What an engine has done and does, for people and metrics. Without torch."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .events import Reason

STEP_TOKENS = (1, 2, 4, 8, 16, 64, 256, 1024, 4096, 16384)
"""Borders for tokens of a step: users that decode together, then pieces of prompts."""
STEP_EXPERTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
"""Borders for experts of a layer in one step; families have 4 to 512."""


@dataclass
class Spread:
    """How often a number was at most as large as each of some borders, without those of the border before.

    Args:
        borders: rising.
        counts: how often; the last of them counts numbers above all borders.
        total: sum of the numbers.
    """

    borders: Sequence[int]
    counts: list[int] = field(default_factory=list)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = self.counts or [0] * (len(self.borders) + 1)

    def note(self, number: float) -> None:
        """One more."""
        self.counts[bisect_left(self.borders, number)] += 1
        self.total += number

    def copy(self) -> "Spread":
        """What it is now."""
        return Spread(self.borders, list(self.counts), self.total)


@dataclass(frozen=True, kw_only=True)
class EngineCounters:
    """A moment of an engine; what ends in `_total` or `_s` only grows.

    Args:
        running: requests whose answers are generated.
        reading: those of them whose prompts are not read yet.
        queued: requests that wait.
        kv_capacity: tokens that the KV pool holds, of which `kv_reserved` are promised to running requests, `kv_in_use`
            are there, and `kv_kept` belong to kept prefixes.
        is_together: whether several users' tokens are computed in one step now; `can_pack` whether that is possible.
        prompt_tokens_total: tokens of prompts, of which `cached_tokens_total` were kept from before.
        completion_tokens_total: tokens generated.
        prefill_s, decode_s: seconds of steps that read prompts and of others.
        steps_total: calls of the model; `rows_total` tokens in those that decode.
        step_tokens, step_experts: tokens of each step, and experts that a layer asked for in it, as the mean of all.
        finished_total: requests by reason, `refused_total` those that were not accepted.
        proposed_total, accepted_total: tokens of prompt lookup.
        overtaken_total: waiting requests that a later one was started before, because it uses the experts of others.
        hits_L, misses_L, bytes_read_L: experts of each layer that were in slots, that were not, and what was read.
        disk_busy_s: seconds in which the disk had something to read.
    """

    state: str
    running: int = 0
    reading: int = 0
    queued: int = 0
    kv_capacity: int = 0
    kv_reserved: int = 0
    kv_in_use: int = 0
    kv_kept: int = 0
    is_together: bool = False
    can_pack: bool | None = None
    prompt_tokens_total: int = 0
    cached_tokens_total: int = 0
    completion_tokens_total: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    steps_total: int = 0
    rows_total: int = 0
    step_tokens: Spread = field(default_factory=lambda: Spread(STEP_TOKENS))
    step_experts: Spread = field(default_factory=lambda: Spread(STEP_EXPERTS))
    finished_total: dict[Reason, int] = field(default_factory=dict)
    refused_total: int = 0
    proposed_total: int = 0
    accepted_total: int = 0
    overtaken_total: int = 0
    hits_L: tuple[int, ...] = ()
    misses_L: tuple[int, ...] = ()
    bytes_read_L: tuple[int, ...] = ()
    disk_busy_s: float = 0.0

    def as_json(self) -> dict[str, Any]:
        """The same, as JSON values."""
        return asdict(self)


@dataclass
class Tally:
    """What only grows, counted by the engine's thread."""

    prompt_tokens_total: int = 0
    cached_tokens_total: int = 0
    completion_tokens_total: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    steps_total: int = 0
    rows_total: int = 0
    proposed_total: int = 0
    accepted_total: int = 0
    overtaken_total: int = 0
    step_tokens: Spread = field(default_factory=lambda: Spread(STEP_TOKENS))
    step_experts: Spread = field(default_factory=lambda: Spread(STEP_EXPERTS))
    finished_total: Counter[Reason] = field(default_factory=Counter)

    def grown(self) -> dict[str, Any]:
        """All of it as it is now, to be read in other threads."""
        values = vars(self).copy()
        spreads = {name: value.copy() for name, value in values.items() if isinstance(value, Spread)}
        return {**values, **spreads, "finished_total": dict(self.finished_total)}
