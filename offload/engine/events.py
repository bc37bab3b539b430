"""What comes back for a request: its tokens, how it ended, and how far it is; why a request was refused."""

from dataclasses import dataclass, field
from typing import Literal

State = Literal["queued", "prefill", "decode", "finished"]
Reason = Literal["stop", "length", "cancelled", "invalid", "error"]


@dataclass(frozen=True, kw_only=True)
class Reads:
    """Experts that steps of the model asked for, of all layers.

    Args:
        hits, misses: those that were in slots, and those that were not.
        nbytes: bytes that were read from files.
    """

    hits: int = 0
    misses: int = 0
    nbytes: int = 0

    def __add__(self, other: "Reads") -> "Reads":
        return Reads(hits=self.hits + other.hits, misses=self.misses + other.misses, nbytes=self.nbytes + other.nbytes)

    def __sub__(self, other: "Reads") -> "Reads":
        return Reads(hits=self.hits - other.hits, misses=self.misses - other.misses, nbytes=self.nbytes - other.nbytes)


@dataclass(frozen=True, kw_only=True)
class TokenEvent:
    """One generated token.

    Args:
        index: its place in the answer, from 0.
        token_id: an id of the vocabulary; end tokens are reported as well.
        logprob: its log-probability by the model, before bias, penalties and temperature; None if not asked for.
        top_logprobs: the likeliest tokens and their log-probabilities, likeliest first; empty if not asked for.
    """

    index: int
    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What a request took.

    Args:
        prompt_tokens: those of the prompt, the cached ones included.
        cached_tokens: those whose keys and values were kept from an earlier request of the same owner.
        completion_tokens: tokens generated, the end token included.
        queue_s, prefill_s, decode_s: seconds until admission, until the first token, and from there to the end.
        reads: experts of all steps that it had a part in; a step of several requests counts for each of them.
    """

    prompt_tokens: int
    cached_tokens: int = 0
    completion_tokens: int = 0
    queue_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    reads: Reads = field(default_factory=Reads)


@dataclass(frozen=True, kw_only=True)
class Finished:
    """The last event of a request.

    Args:
        reason: `stop` for an end token, stop token or `is_stop`; `length` when `max_new_tokens` were generated;
            `cancelled` after `Stream.cancel` or when the engine closed; `invalid` if its own constraint or bias leaves
            no way on; `error` if anything else failed. The last two come with a message.
        usage: what the request took.
        message: one line about an error or a cancellation; empty otherwise.
    """

    reason: Reason
    usage: Usage
    message: str = ""


Event = TokenEvent | Finished


@dataclass(frozen=True, kw_only=True)
class Position:
    """How far a request is, for those who wait.

    Args:
        state: what happens to it now.
        ahead: requests before it in the queue.
        prefilled_tokens: tokens of the prompt whose keys and values are there, of which `cached_tokens` were kept.
        prompt_tokens: all of the prompt, at least 1.
    """

    state: State
    ahead: int
    prefilled_tokens: int
    prompt_tokens: int
    cached_tokens: int = 0


class QueueFull(RuntimeError):
    """The queue holds as many requests as it may.

    Args:
        retry_after_s: when a place is expected to be free, by the rates measured so far.
    """

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class NotReady(RuntimeError):
    """The engine is loading its model, is closing, or has failed; the message says which."""
