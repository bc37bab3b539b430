"""Whose tokens are computed next: in turns or together, and how prompts and answers share the time. Without torch.

With few slots, users whose tokens are computed together throw out each other's experts faster than they share reads.
In turns, each finds his experts where he left them. In memory, or with many users, together is quicker, because each
expert is read once for all.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from .rates import ExpertLoad, StepRates

MOST_TURN_TOKENS = 64
"""Tokens of one turn at most. On a trace of GPT-OSS-20B at 8 of 32 slots, turns of 64 tokens miss 1.34 experts per
token and layer, turns of 16 miss 1.43, one user alone 1.27."""
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


class Schedule:
    """Chooses what is computed next, from what steps have taken so far.

    Args:
        mode: `turns`, `together`, or `auto`.
        load: what the model reads.
        longest_wait_s: most seconds between two turns of a user, as far as turns of one token allow.
        decode_share: share of the time that answers keep while prompts are read.
        may_pack: whether several users' tokens may be computed in one step.
        piece_tokens: P, most tokens of a prompt that are read at once.
    """

    def __init__(
        self,
        mode: Literal["auto", "turns", "together"],
        load: ExpertLoad,
        *,
        longest_wait_s: float,
        decode_share: float,
        may_pack: bool,
        piece_tokens: int,
    ) -> None:
        self.may_pack = may_pack
        self._mode, self._longest_wait_s, self._decode_share = mode, longest_wait_s, decode_share
        self._piece_tokens = piece_tokens
        self.rates = StepRates(load)
        self._is_together = False
        self._debt_s = 0.0
        self._piece = (0, 0.0)
        """Tokens of the longest piece of a prompt so far, and seconds that such pieces take."""
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

    def rides(self, prompt_left: int) -> bool:
        """Whether answers join a piece of a prompt: one so long was read before, in a short time."""
        is_known = min(prompt_left, self._piece_tokens) <= self._piece[0]
        return self.may_pack and is_known and self._piece[1] < LONGEST_GAP_S

    def choose(self, candidates: Sequence[Candidate], now_s: float) -> Plan:
        """The next step; nothing where nobody waits."""
        reading = [one for one in candidates if one.prompt_left]
        decoding = [one for one in candidates if not one.prompt_left]
        if not (reading and decoding):
            self._debt_s = 0.0
        if reading and not (decoding and self.owes_decoding):
            prompt = self._next_prompt(reading, now_s)
            riders = tuple(one.key for one in decoding) if self.rides(prompt.prompt_left) else ()
            return Plan(prefill=prompt.key, decode=riders)
        return Plan(decode=self.choose_decoding(decoding)) if decoding else Plan()

    def choose_decoding(self, decoding: Sequence[Candidate]) -> tuple[int, ...]:
        """Whose next tokens are computed, of those that decode; at least one."""
        if self.prefers_together(len(decoding)):
            self._turn = None
            return tuple(one.key for one in decoding)
        keys = {one.key for one in decoding}
        if self._turn is None or self._turn[0] not in keys or self._turn[1] >= self.turn_tokens(len(decoding)):
            self.rates.end_turn()
            self._turn = (min(decoding, key=lambda one: one.since_s).key, 0)
        self._turn = (self._turn[0], self._turn[1] + 1)
        return (self._turn[0],)

    def turn_tokens(self, users: int) -> int:
        """Tokens of one turn, so that nobody waits for longer than he should."""
        alone_s = self.rates.alone()
        if users < 2 or not alone_s:
            return MOST_TURN_TOKENS
        return max(1, min(MOST_TURN_TOKENS, int(self._longest_wait_s / (alone_s * (users - 1)))))

    def prefers_together(self, users: int) -> bool:
        """Whether a step of all users takes fewer seconds per token than a step of one."""
        if users < 2 or not self.may_pack or self._mode == "turns":
            self._is_together = False
        elif self._mode == "together":
            self._is_together = True
        elif not self.rates.knows_turns:
            self._is_together = False
        else:
            gain = self.rates.alone() * users / max(self.rates.together(users), 1e-12)
            self._is_together = gain > (1 / MARGIN if self._is_together else MARGIN)
        return self._is_together

    def note_decoding(self, users: int, seconds: float, stall_s: float, misses: float) -> None:
        """A step of decoding is done.

        Args:
            users: whose tokens it computed.
            seconds: what it took, of which `stall_s` waited for experts.
            misses: experts that were not in slots, per layer.
        """
        self.rates.note(users, seconds, stall_s, misses)
        self.pay(seconds)

    def pay(self, seconds: float) -> None:
        """Answers have had so many seconds."""
        self._debt_s -= seconds

    def note_reading(self, seconds: float, *, others_wait: bool) -> None:
        """So many seconds went into a prompt; answers that wait meanwhile are owed their share of the time."""
        if others_wait:
            self._debt_s += seconds * self._decode_share / (1 - self._decode_share)

    def note_piece(self, tokens: int, seconds: float) -> None:
        """A piece of so many tokens of a prompt took so long; short ones say nothing of long ones."""
        if tokens > self._piece[0]:
            self._piece = (tokens, seconds)
        elif 2 * tokens > self._piece[0]:
            self._piece = (self._piece[0], (self._piece[1] + seconds) / 2)

    def _next_prompt(self, reading: Sequence[Candidate], now_s: float) -> Candidate:
        """The prompt with the least left to read, so that short requests need not wait for long ones; for a while."""
        oldest = min(reading, key=lambda one: one.since_s)
        if now_s - oldest.since_s > self._longest_wait_s:
            return oldest
        return min(reading, key=lambda one: (one.prompt_left, one.since_s))
