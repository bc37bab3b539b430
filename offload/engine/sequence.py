"""One request on its way through the engine: its tokens, cache, sampler, and when it ends."""

import itertools
import time
from collections.abc import Callable, Collection, Sequence

import torch

from .events import Finished, Position, Reads, Reason, State, TokenEvent, Usage
from .kept.cached import CachedTokens
from .planning.lookup import Lookup
from .request import GenerationRequest
from .sampling import Sampler
from .stream import Stream

_numbers = itertools.count()


class RunningSequence:
    """A request and what has become of it; changed by the engine's thread alone once it is admitted.

    Args:
        request: what was asked for.
        end_ids: tokens that end an answer of this model.
        cancel: called when its reader wants no more; the sequence is told by `is_cancelled`.
        ahead: how many requests wait before it.
    """

    def __init__(
        self,
        request: GenerationRequest,
        end_ids: Collection[int],
        *,
        cancel: Callable[["RunningSequence"], None],
        ahead: Callable[["RunningSequence"], int],
    ) -> None:
        self.key = next(_numbers)
        self.request = request
        self.stream = Stream(lambda: cancel(self), lambda: self._position(ahead(self)))
        self.state: State = "queued"
        self.is_cancelled = False
        self.is_whole = True
        """Whether its cache can be kept: false from an interrupted step on."""
        self.cached: CachedTokens | None = None
        self.lookup: Lookup | None = None
        self.num_cached = self.num_tokens = 0
        self.reads = Reads()
        self.came_s = self.served_s = time.monotonic()
        self._admitted_s = self._first_s = self.came_s
        self._end_ids = request.stop_ids | (frozenset() if request.ignore_end else frozenset(end_ids))
        self._sampler: Sampler | None = None
        self._pending: list[int] = list(request.prompt_ids)
        """Tokens whose keys and values are not computed: what is left of the prompt, or the last token."""

    @property
    def owner(self) -> str:
        return self.request.owner

    @property
    def tokens(self) -> CachedTokens:
        """The tokens that are computed, of an admitted request."""
        assert self.cached is not None
        return self.cached

    @property
    def prompt_left(self) -> int:
        """Tokens of the prompt that are still to be read; 0 when it decodes."""
        return 0 if self.state == "decode" else len(self._pending)

    @property
    def last_token(self) -> int:
        return self._pending[-1]

    def admit(self, cached: CachedTokens, lookup: Lookup | None) -> None:
        """Start from these tokens of its prompt."""
        self.cached, self.lookup = cached, lookup
        self.num_cached = len(cached)
        self._pending = list(self.request.prompt_ids[len(cached) :])
        self._sampler = Sampler(self.request)
        self._admitted_s = time.monotonic()
        self.state = "prefill"

    def next_piece(self, piece_tokens: int) -> list[int]:
        """What is read next of the prompt: up to the next multiple of `piece_tokens`, whoever else is served."""
        return self._pending[: piece_tokens - len(self.tokens) % piece_tokens]

    def note_read(self, piece: Sequence[int], piece_tokens: int) -> None:
        """A piece of the prompt is computed."""
        tokens = self.tokens
        if tokens.num_canonical == len(tokens) - len(piece) and len(piece) == piece_tokens:
            tokens.num_canonical = len(tokens)
        del self._pending[: len(piece)]
        tokens.take_snapshot()

    def draft(self) -> list[int]:
        """Tokens that may come after the last one."""
        left = self.request.max_new_tokens - self.num_tokens - 1
        return [] if self.lookup is None else self.lookup.propose(left)

    def take_token(self, logits_V: torch.Tensor) -> Reason | None:
        """Choose the next token and send it; why the answer ends, or None.

        Raises:
            ValueError: if no token can be chosen.
            Exception: whatever the request's own `is_stop` or constraint raise.
        """
        assert self._sampler is not None
        event = self._sampler.choose(logits_V)
        if self.state == "prefill":
            self.state, self._first_s = "decode", time.monotonic()
        self._pending = [event.token_id]
        self.num_tokens += 1
        self.served_s = time.monotonic()
        if self.lookup is not None:
            self.lookup.extend(self._pending)
        # asked before the event is sent, so that a reader who sees the token also sees what `is_stop` made of it
        reason = self._reason(event)
        self.stream.put(event)
        return reason

    def _reason(self, event: TokenEvent) -> Reason | None:
        if event.token_id in self._end_ids:
            return "stop"
        if self.request.is_stop is not None and self.request.is_stop(event.token_id):
            return "stop"
        return "length" if self.num_tokens >= self.request.max_new_tokens else None

    def finish(self, reason: Reason, message: str = "") -> None:
        """Send the last event, once."""
        if self.state == "finished":
            return
        was, self.state = self.state, "finished"
        self.stream.put(Finished(reason=reason, usage=self._usage(was, time.monotonic()), message=message))

    def _usage(self, was: State, now_s: float) -> Usage:
        admitted_s = now_s if was == "queued" else self._admitted_s
        first_s = self._first_s if was == "decode" else now_s
        return Usage(
            prompt_tokens=len(self.request.prompt_ids),
            cached_tokens=self.num_cached,
            completion_tokens=self.num_tokens,
            queue_s=admitted_s - self.came_s,
            prefill_s=first_s - admitted_s,
            decode_s=now_s - first_s,
            reads=self.reads,
        )

    def _position(self, ahead: int) -> Position:
        prompt_tokens = len(self.request.prompt_ids)
        read = 0 if self.cached is None else min(len(self.cached), prompt_tokens)
        return Position(
            state=self.state,
            ahead=ahead,
            prefilled_tokens=read,
            prompt_tokens=prompt_tokens,
            cached_tokens=self.num_cached,
        )
