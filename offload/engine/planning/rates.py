"""What a decoded token takes in turns and together: measured, or predicted from the experts that a step touches.

Without torch.
"""

from collections import deque
from dataclasses import dataclass, field
from statistics import median

MEMORY = 0.9
"""Weight of the past in the moving average of steps together: about ten steps; not tuned."""
WARM_STEPS = 16
"""Steps together that are not counted: they read what turns have thrown out."""
TRUSTED_STEPS = 16
"""Steps of one kind before their measurement counts."""
TRUSTED_TURNS = 2
"""Turns before their measurement counts, where experts are read from disk: the first of them begins cold."""
HOPELESS_STEPS = 8
"""Steps together after which they are given up, if the median of the latest was slower than turns. On GPT-OSS-20B's
routing at 10 of 32 slots, four users together took 1.5 times as long a token; a whole trial is 32 tokens of each."""
LATEST_STEPS = 4
"""Of them, those that no longer read what turns have thrown out; not tuned."""
STALE_TOKENS = 4000
"""Tokens after which a measurement of the way that is not in use is forgotten: turns are measured again, steps together
are predicted again. The texts have changed meanwhile. Measuring takes 3 % of these tokens."""
SCATTERED = 1.8
"""Of the experts that many users touch together, the share of slots that are not there to this power misses, because
each throws out what the next ones need. Fitted to GPT-OSS-20B's routing at 4 to 24 of 32 slots, 2 to 16 users: within
20 %, mostly 15. Steps together are tried only where they promise to be quicker by `MARGIN`: 20 trial steps of four
users at 10 of 32 slots cost 0.13 misses more per token and layer (1.46 against 1.33 without, 128 tokens of each)."""
ALIKE = 0.85
"""So many independent users, as a power of their number, touch as many experts as the users do, who all like some
experts more. On GPT-OSS-20B's routing: within 10 % for 2 to 32 users."""


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
        """Experts of one layer that tokens of so many users touch together."""
        return self.num_experts * (1 - (1 - self.top_k / self.num_experts) ** users**ALIKE)

    def misses(self, users: int, alone: float) -> float:
        """Experts of one layer that a step of several users reads from disk; never fewer than do not fit.

        Args:
            users: at least one.
            alone: those that a step of one user reads.
        """
        touched, absent = self.distinct(users), max(1 - self.slots / self.num_experts, 0.0)
        scattered = absent**SCATTERED
        share = scattered - (scattered - min(alone / self.top_k, scattered)) / users
        return max(touched * share, touched - self.slots, 0.0)

    def compute(self, users: int) -> float:
        """Bytes that a step of several users reads from memory, in steps of one user."""
        return 1 + self.expert_share * (self.distinct(users) / self.top_k - 1)


@dataclass
class _Sum:
    """Steps of one token, added up."""

    seconds: float = 0.0
    stall_s: float = 0.0
    misses: float = 0.0
    steps: int = 0

    def add(self, seconds: float, stall_s: float, misses: float) -> None:
        self.seconds += seconds
        self.stall_s += stall_s
        self.misses += misses
        self.steps += 1


@dataclass
class _Average:
    """Steps of a number of users: seconds of one and of the latest, steps, and tokens before the last one."""

    seconds: float
    steps: int = 0
    tokens: int = 0
    latest: deque[float] = field(default_factory=lambda: deque(maxlen=LATEST_STEPS))


@dataclass
class StepRates:
    """Seconds per step of one user and of several, from what steps have taken.

    Args:
        load: what the model reads.
    """

    load: ExpertLoad
    _tokens: int = 0
    _turn: _Sum = field(default_factory=_Sum)
    _last_turn: _Sum = field(default_factory=_Sum)
    _turns: int = 0
    _turn_tokens: int = 0
    _together: dict[int, _Average] = field(default_factory=dict)

    def note(self, users: int, seconds: float, stall_s: float, misses: float) -> None:
        """A step is done, of so many users; see `Schedule.note_decoding`."""
        self._tokens += users
        if users == 1:
            if self._tokens - self._turn_tokens > STALE_TOKENS:
                self._turns, self._turn = 0, _Sum()
            self._turn.add(seconds, stall_s, misses)
            self._turn_tokens = self._tokens
            return
        known = self._together.get(users)
        if known is None or self._tokens - known.tokens > STALE_TOKENS:
            known = self._together[users] = _Average(seconds)
        before = seconds if known.steps <= WARM_STEPS else known.seconds
        known.seconds = MEMORY * before + (1 - MEMORY) * seconds
        known.latest.append(seconds)
        known.steps, known.tokens = known.steps + 1, self._tokens

    def end_turn(self) -> None:
        """The turn of one user is over; the next one begins with what this one has left in the slots."""
        if self._turn.steps >= TRUSTED_STEPS:
            self._last_turn, self._turns = self._turn, self._turns + 1
            self._turn = _Sum()

    @property
    def knows_turns(self) -> bool:
        """Whether steps of one user were measured well, and lately."""
        if self._tokens - self._turn_tokens > STALE_TOKENS:
            return False
        return self._turns >= TRUSTED_TURNS or (self._is_in_memory and self._turn.steps >= TRUSTED_STEPS)

    def alone(self) -> float:
        """Seconds of a step of one user, over a whole turn; 0 before any step was measured."""
        return self._alone.seconds / max(self._alone.steps, 1)

    def together(self, users: int) -> float:
        """Seconds of a step of so many users: measured lately, or predicted from steps of one."""
        known = self._together.get(users)
        if known and self._tokens - known.tokens < STALE_TOKENS:
            if known.steps >= WARM_STEPS + TRUSTED_STEPS:
                return known.seconds
            if known.steps >= HOPELESS_STEPS and median(known.latest) > users * self.alone():
                return median(known.latest)
        sums, steps = self._alone, max(self._alone.steps, 1)
        compute_s = (sums.seconds - sums.stall_s) / steps * self.load.compute(users)
        stall_s = sums.stall_s / sums.misses * self.load.misses(users, sums.misses / steps) if sums.misses else 0.0
        return compute_s + stall_s

    @property
    def _alone(self) -> _Sum:
        return self._last_turn if self._turns and not self._is_in_memory else self._turn

    @property
    def _is_in_memory(self) -> bool:
        """Whether every expert has a slot: nothing that one user does slows the next one down."""
        return self.load.slots >= self.load.num_experts
