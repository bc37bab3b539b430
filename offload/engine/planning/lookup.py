"""Proposes tokens that followed the same words before, as long as that pays. Without torch.

Source: prompt lookup decoding (Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding); the test of utility is that
of Cascade (arXiv:2506.20675): tokens gained against time lost, per request.
"""

from collections.abc import Sequence

LONGEST_GRAM, SHORTEST_GRAM = 4, 2
"""Tokens that must have stood together before. One token alone proposes too much that is wrong; not tuned."""
MOST_PROPOSED = 4
"""Tokens at a time. A step of 4 reads 1.9 (in memory) to 3.5 (from disk) times the experts of one; 8 read more than a
proposal gains on prose."""
LEAST_UTILITY = 1.05
"""Proposals stop below it. A little above 1, because the measurement of both sides is noisy."""
TRIES = 4
"""Steps with a proposal before the first judgement."""
PAUSE_TOKENS = 64
"""Tokens without proposals before they are tried again; a text may turn into a quotation."""
MEMORY = 0.8
"""Weight of the past in moving averages of seconds and tokens: about five steps; not tuned."""


class Lookup:
    """Proposals for one request, from its own tokens.

    Args:
        token_ids: its prompt; may be empty.
        is_gated: whether proposals stop while they do not pay.
    """

    def __init__(self, token_ids: Sequence[int], *, is_gated: bool = True) -> None:
        self._ids: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}
        self._is_gated = is_gated
        self._alone_s = self._step_s = self._gained = 0.0
        self._tries = self._pause = 0
        self.num_proposed = self.num_accepted = 0
        self.extend(token_ids)

    def extend(self, token_ids: Sequence[int]) -> None:
        """Tokens that follow."""
        for token_id in token_ids:
            # what ends here is known once its next token is: otherwise a gram would find itself
            self._remember(len(self._ids))
            self._ids.append(token_id)
            self._pause = max(self._pause - 1, 0)

    def _remember(self, end: int) -> None:
        for length in range(SHORTEST_GRAM, min(LONGEST_GRAM, end) + 1):
            self._ends[tuple(self._ids[end - length : end])] = end

    def propose(self, most: int) -> list[int]:
        """Tokens that may come next; none where nothing was found, or where proposals do not pay.

        Args:
            most: tokens at most, 0 or more.
        """
        if self._pause or most < 1:
            return []
        for length in range(min(LONGEST_GRAM, len(self._ids)), SHORTEST_GRAM - 1, -1):
            end = self._ends.get(tuple(self._ids[-length:]))
            if end is not None:
                return self._ids[end : end + min(most, MOST_PROPOSED)]
        return []

    def note_alone(self, seconds: float) -> None:
        """A step of one token took so long."""
        self._alone_s = _blend(self._alone_s, seconds)

    def note_proposal(self, proposed: int, accepted: int, seconds: float) -> None:
        """A step with a proposal gave `accepted + 1` tokens and took so long."""
        self.num_proposed += proposed
        self.num_accepted += accepted
        self._step_s = _blend(self._step_s, seconds)
        self._gained = _blend(self._gained, accepted + 1.0)
        self._tries += 1
        if self._is_gated and self._tries >= TRIES and self.utility < LEAST_UTILITY:
            self._pause, self._tries, self._step_s, self._gained = PAUSE_TOKENS, 0, 0.0, 0.0

    @property
    def utility(self) -> float:
        """Tokens per step with a proposal, over the time of such a step in steps of one token."""
        return self._gained * self._alone_s / self._step_s if self._step_s and self._alone_s else 1.0


def _blend(before: float, value: float) -> float:
    return value if before == 0 else MEMORY * before + (1 - MEMORY) * value
