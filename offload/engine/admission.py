"""Starts requests when the KV pool has room for all they may need, from what is kept of their prompts; ends them."""

from collections.abc import Iterable, Sequence

from ..compute.kv_cache import room_positions
from .counters import Tally
from .events import Reason
from .kept.cached import CachedTokens
from .kept.folder import PrefixFolder
from .kept.prefixes import Prefixes, best
from .options import EngineOptions
from .planning.likeness import LikeFirst
from .planning.lookup import Lookup
from .planning.pool import TokenPool
from .sequence import RunningSequence
from .step import ModelSteps

WORTH_WAITING = 32
"""Tokens of a common prefix for which a request waits until another has read them. Fewer are read as quickly; not
tuned."""

WORTH_READING = 32
"""Tokens that a file must save beyond what is in RAM; reading fewer from disk gains nothing. Not tuned."""


class Admission:
    """The running requests of an engine, their places in the pool, and kept prefixes.

    Args:
        steps: gives empty caches.
        pool: places for tokens.
        prefixes: what earlier requests left.
        options: limits of the engine.
        piece_tokens: P, tokens of one piece of a prompt.
        reuse: `any`, `aligned` or `off`.
        looks_up: whether tokens are guessed.
        folder: where finished sequences are written; None keeps them in RAM only.
        tally: counts prompts and kept tokens.
        likeness: prefers who uses the experts of running requests; None keeps the order of those who wait.
    """

    def __init__(
        self,
        steps: ModelSteps,
        pool: TokenPool,
        prefixes: Prefixes,
        options: EngineOptions,
        *,
        piece_tokens: int,
        reuse: str,
        looks_up: bool,
        folder: PrefixFolder | None,
        tally: Tally,
        likeness: LikeFirst | None = None,
    ) -> None:
        self.running: list[RunningSequence] = []
        self.pool = pool
        self._steps, self._prefixes, self._options, self._tally = steps, prefixes, options, tally
        self._piece_tokens = piece_tokens if reuse == "aligned" else None
        self._keeps, self._looks_up, self._folder = reuse != "off", looks_up, folder
        self._likeness = likeness

    def next_of(self, waiting: Iterable[RunningSequence]) -> RunningSequence | None:
        """Who can start now, of those who wait in this order; nobody overtakes one for whom the pool is too full."""
        if len(self.running) >= self._options.most_users:
            return None
        in_order = waiting if self._likeness is None else self._likeness.order(waiting, self.running)
        found = next((sequence for sequence in in_order if not self._is_being_read(sequence)), None)
        if found is None or places_of(found.request.num_reserved) > self.pool.capacity - self.pool.reserved:
            return None
        if self._likeness is not None:
            self._tally.overtaken_total += self._likeness.note_start(found, in_order)
        return found

    def start(self, sequence: RunningSequence) -> None:
        """Let a request in, which `next_of` has found."""
        source, length = self._source(sequence)
        if self._folder is not None:
            prompt_ids, least = sequence.request.prompt_ids, length + WORTH_READING
            loaded = self._folder.find(sequence.owner, prompt_ids, self._piece_tokens, least)
            if loaded is not None:
                source, length = best([loaded], prompt_ids, self._piece_tokens)
        if source is not None:
            self._prefixes.use(source)
        reserved = places_of(sequence.request.num_reserved)
        self._make_room(reserved)
        self.pool.take(sequence.key, reserved)
        cached = self._steps.empty() if source is None else source.fork(length)
        lookup = None
        if self._looks_up:
            lookup = Lookup(sequence.request.prompt_ids, is_gated=self._options.lookup != "always")
        sequence.admit(cached, lookup)
        self.running.append(sequence)
        self._tally.prompt_tokens_total += len(sequence.request.prompt_ids)
        self._tally.cached_tokens_total += length

    def refuse(self, sequence: RunningSequence, message: str) -> None:
        """End a request that could not be started."""
        self.pool.give(sequence.key)
        self._tally.finished_total["error"] += 1
        sequence.finish("error", message)

    def end(self, sequence: RunningSequence, reason: Reason, message: str = "") -> None:
        """End a running request; what it computed is kept if there is room."""
        self.running.remove(sequence)
        self.pool.give(sequence.key)
        if self._keeps and sequence.is_whole and reason != "error":
            self._prefixes.keep(sequence.owner, sequence.tokens)
            if self._folder is not None:
                self._folder.save(sequence.owner, sequence.tokens)
            self._make_room(0)
        if sequence.lookup is not None:
            self._tally.proposed_total += sequence.lookup.num_proposed
            self._tally.accepted_total += sequence.lookup.num_accepted
        self._tally.finished_total[reason] += 1
        # after the books are in order: a caller who sees the end may look at the counters
        sequence.cached = None
        sequence.finish(reason, message)

    def close(self) -> None:
        """Write what is still to be kept on disk."""
        if self._folder is not None:
            self._folder.close()

    def _make_room(self, tokens: int) -> None:
        """Give up kept prefixes until so many places are free."""
        self.pool.kept = self._prefixes.num_tokens
        while self.pool.free < tokens and self._prefixes.drop_oldest():
            self.pool.kept = self._prefixes.num_tokens

    def _source(self, sequence: RunningSequence) -> tuple[CachedTokens | None, int]:
        """What saves this request the most of its prompt: a kept prefix or a running request of the same owner."""
        if not self._keeps:
            return None, 0
        running = [other.tokens for other in self.running if other.owner == sequence.owner and other.is_whole]
        kept = [*self._prefixes.of(sequence.owner), *running]
        return best(kept, sequence.request.prompt_ids, self._piece_tokens)

    def _is_being_read(self, sequence: RunningSequence) -> bool:
        """Whether a running request is reading much of the same prompt just now."""
        if not self._keeps:
            return False
        prompt_ids = sequence.request.prompt_ids
        others = [other for other in self.running if other.owner == sequence.owner and other.state == "prefill"]
        ahead = max((_common(other.request.prompt_ids, prompt_ids) for other in others), default=0)
        if self._piece_tokens is not None and ahead < len(prompt_ids):
            ahead = ahead // self._piece_tokens * self._piece_tokens
        return ahead >= WORTH_WAITING and ahead > self._source(sequence)[1] + WORTH_WAITING


def places_of(tokens: int) -> int:
    """Places that a sequence of so many tokens takes: caches that grow in place have some to spare."""
    return room_positions(tokens)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = zip(one, other, strict=False)
    return next((place for place, (left, right) in enumerate(pairs) if left != right), min(len(one), len(other)))
