"""Whose tokens are computed next: in turns or together, and how prompts and answers share the time. Without torch.

With few slots, users whose tokens are computed together throw out each other's experts faster than they share reads.
In turns, each finds his experts where he left them. In memory, or with many users, together is quicker, because each
expert is read once for all.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

MOST_TURN_TOKENS = 64
"""Tokens of one turn at most. On a trace of GPT-OSS-20B at 8 of 32 slots, turns of 64 tokens miss 1.34 experts per
token and layer, turns of 16 miss 1.43, one user alone 1.27."""
MEMORY = 0.9
"""Weight of the past in moving averages of a step's seconds: about ten steps; not tuned."""
TRUSTED_STEPS = 4
"""Steps together that were measured before the measurement replaces the prediction; the first of them read what the
turns before had thrown out."""
STALE_TOKENS = 2000
"""Tokens after which a measurement of the way that is not in use is forgotten and the prediction counts again: the
texts have changed. Not tuned."""
MARGIN = 1.05
"""How much better the other way must be, so that noise does not switch to and fro."""
LONGEST_GAP_S = 2.0
"""A running answer should not stand still for longer while a prompt is read."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A request that could be computed.

    Args:
        key: names it.
        prompt_left: tokens of its prompt that are still to be read; 0 when it decodes.
        since_s: when it was served last, or came.
    """

    key: int
    prompt_left: int
    since_s: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the next step computes: a piece of one prompt, or a token of each of some answers, or both."""

    prefill: int | None = None
    decode: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ExpertLoad:
    """What decides how many experts a step reads; sizes of the model, and its slots.

    Args:
        num_experts: E of one layer.
        top_k: K, experts of one token in one layer.
        slots: C, slots of a layer on average.
        expert_share: share of the bytes of a single token's step, 0 to 1, that are experts.
    """

    num_experts: int
    top_k: int
    slots: float
    expert_share: float

    def distinct(self, users: int) -> float:
        """Experts of one layer that tokens of so many users touch together, if they choose independently."""
        return self.num_experts * (1 - (1 - self.top_k / self.num_experts) ** users)

    def misses(self, users: int) -> float:
        """Experts of one layer that a step of several users reads from disk.

        Of those that are touched, a share of the square of what is not in slots misses, and never fewer than do not
        fit. Within 25 % of what a replay of GPT-OSS-20B's routing gives at 8 and 16 of 32 slots, 4 to 32 users.
        """
        touched, absent = self.distinct(users), max(1 - self.slots / self.num_experts, 0.0)
        return max(touched * absent**2, touched - self.slots, 0.0)

    def compute(self, users: int) -> float:
        """Bytes that a step of several users reads from memory, in steps of one user."""
        return 1 + self.expert_share * (self.distinct(users) / self.top_k - 1)


class Schedule:
    """Chooses what is computed next, from what steps have taken so far.

    Args:
        mode: `turns`, `together`, or `auto`.
        load: what the model reads.
        longest_wait_s: most seconds between two turns of a user, as far as turns of one token allow.
        decode_share: share of the time that answers keep while prompts are read.
        may_pack: whether several users' tokens may be computed in one step.
    """

    def __init__(
        self,
        mode: Literal["auto", "turns", "together"],
        load: ExpertLoad,
        *,
        longest_wait_s: float,
        decode_share: float,
        may_pack: bool,
    ) -> None:
        self.may_pack = may_pack
        self._mode, self._load, self._longest_wait_s, self._decode_share = mode, load, longest_wait_s, decode_share
        self._alone_s = self._alone_stall_s = self._alone_misses = 0.0
        self._together_s: dict[int, tuple[float, int, int]] = {}
        """Users -> seconds of a step together, how many were measured, and after how many tokens the last one."""
        self._tokens = 0
        self._is_together = False
        self._piece_s = self._debt_s = 0.0
        self._turn: tuple[int, int] | None = None
        """Whose turn it is, and his tokens in it."""

    @property
    def owes_decoding(self) -> bool:
        """Whether answers have had less than their share of the time since prompts were read."""
        return self._debt_s > 0

    @property
    def is_together(self) -> bool:
        """Whether the last choice between turns and together was together."""
        return self._is_together

    @property
    def rides(self) -> bool:
        """Whether answers join the pieces of prompts, which are short enough for that."""
        return self.may_pack and self._piece_s < LONGEST_GAP_S

    def choose(self, candidates: Sequence[Candidate], now_s: float) -> Plan:
        """The next step; nothing where nobody waits."""
        reading = [one for one in candidates if one.prompt_left]
        decoding = [one for one in candidates if not one.prompt_left]
        if not decoding:
            self._debt_s = 0.0
        if reading and not (decoding and self.owes_decoding):
            riders = tuple(one.key for one in decoding) if self.rides else ()
            return Plan(prefill=self._next_prompt(reading, now_s), decode=riders)
        return Plan(decode=self.choose_decoding(decoding)) if decoding else Plan()

    def choose_decoding(self, decoding: Sequence[Candidate]) -> tuple[int, ...]:
        """Whose next tokens are computed, of those that decode; at least one."""
        if self.prefers_together(len(decoding)):
            self._turn = None
            return tuple(one.key for one in decoding)
        keys = {one.key for one in decoding}
        if self._turn is None or self._turn[0] not in keys or self._turn[1] >= self.turn_tokens(len(decoding)):
            self._turn = (min(decoding, key=lambda one: one.since_s).key, 0)
        self._turn = (self._turn[0], self._turn[1] + 1)
        return (self._turn[0],)

    def turn_tokens(self, users: int) -> int:
        """Tokens of one turn, so that nobody waits for longer than he should."""
        if users < 2 or not self._alone_s:
            return MOST_TURN_TOKENS
        return max(1, min(MOST_TURN_TOKENS, int(self._longest_wait_s / (self._alone_s * (users - 1)))))

    def prefers_together(self, users: int) -> bool:
        """Whether a step of all users takes fewer seconds per token than a step of one."""
        if users < 2 or not self.may_pack or self._mode == "turns":
            self._is_together = False
        elif self._mode == "together":
            self._is_together = True
        else:
            gain = self.seconds_alone() / max(self.seconds_together(users) / users, 1e-12)
            self._is_together = gain > (1 / MARGIN if self._is_together else MARGIN)
        return self._is_together

    def seconds_alone(self) -> float:
        """Seconds of a step of one user; 1 before any was measured."""
        return self._alone_s or 1.0

    def seconds_together(self, users: int) -> float:
        """Seconds of a step of so many users: measured lately, or predicted from steps of one."""
        seconds, steps, tokens = self._together_s.get(users, (0.0, 0, 0))
        if steps >= TRUSTED_STEPS and self._tokens - tokens < STALE_TOKENS:
            return seconds
        if not self._alone_s:
            misses = self._load.misses(users) / max(self._load.misses(1), 1e-9)
            return misses if self._load.misses(1) else self._load.compute(users)
        stall_s = self._alone_stall_s * self._load.misses(users) / max(self._alone_misses, 1e-9)
        compute_s = max(self._alone_s - self._alone_stall_s, 0.0) * self._load.compute(users)
        return (stall_s if self._alone_misses > 0 else 0.0) + compute_s

    def note_decoding(self, users: int, seconds: float, stall_s: float, misses: float) -> None:
        """A step of decoding is done.

        Args:
            users: whose tokens it computed.
            seconds: what it took, of which `stall_s` waited for experts.
            misses: experts that were not in slots, per layer.
        """
        self._tokens += users
        self.pay(seconds)
        if users > 1:
            before, steps, _ = self._together_s.get(users, (seconds, 0, 0))
            self._together_s[users] = (_blend(before, seconds), steps + 1, self._tokens)
            return
        self._alone_stall_s = _blend(self._alone_stall_s, stall_s) if self._alone_s else stall_s
        self._alone_misses = _blend(self._alone_misses, misses) if self._alone_s else misses
        self._alone_s = _blend(self._alone_s, seconds) if self._alone_s else seconds

    def pay(self, seconds: float) -> None:
        """Answers have had so many seconds."""
        self._debt_s -= seconds

    def note_reading(self, seconds: float, *, others_wait: bool) -> None:
        """So many seconds went into a prompt; answers that wait meanwhile are owed their share of the time."""
        if others_wait:
            self._debt_s = max(self._debt_s, 0.0) + seconds * self._decode_share / (1 - self._decode_share)

    def note_piece(self, seconds: float) -> None:
        """A whole piece of a prompt took so long."""
        self._piece_s = _blend(self._piece_s, seconds) if self._piece_s else seconds

    def _next_prompt(self, reading: Sequence[Candidate], now_s: float) -> int:
        """The prompt with the least left to read, so that short requests need not wait for long ones; for a while."""
        oldest = min(reading, key=lambda one: one.since_s)
        if now_s - oldest.since_s > self._longest_wait_s:
            return oldest.key
        return min(reading, key=lambda one: (one.prompt_left, one.since_s)).key


def _blend(before: float, value: float) -> float:
    return MEMORY * before + (1 - MEMORY) * value
