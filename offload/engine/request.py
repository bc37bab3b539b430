"""What a caller asks of the engine: token ids, how to choose the next one, and when to stop. Without torch.

Shapes: V vocabulary.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

MOST_TOP_LOGPROBS = 20
"""The most alternatives per token that the OpenAI interface knows."""
MOST_BIASED = 1024
"""Token ids in `logit_bias` at most. The OpenAI interface allows 300 and vLLM 1,024; each is one addition per step."""
SEED_LIMIT = 1 << 64
"""torch's generators take 64 bits."""


class TokenConstraint(Protocol):
    """A grammar that says which tokens may come next; it belongs to one request and is used by the engine's thread."""

    def allowed_V(self) -> NDArray[np.bool_]:
        """The tokens that may come next, true where allowed.

        Ids beyond the array's length are forbidden. End tokens are allowed where the grammar may end.
        """

    def accept(self, token_id: int) -> None:
        """The token that was chosen; called once per token, in order."""


class ConstraintError(ValueError):
    """What a request demands of its tokens cannot be met; a TokenConstraint raises it, too."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen from the logits.

    The order is that of vLLM: bias and constraint, penalties, temperature, `min_p`, `top_k`, `typical_p`, `top_p`.

    Args:
        temperature: divides the logits, 0 to 100; 0 takes the largest logit, of equal ones the lowest id.
        top_p: keeps the likeliest tokens whose probabilities sum to this, above 0 to 1.
        top_k: keeps this many tokens; 0 and -1 keep all.
        min_p: drops tokens below this share of the largest probability, 0 to 1.
        typical_p: keeps the tokens of the most typical surprise up to this probability, above 0 to 1.
        seed: of this request's random numbers; None draws one. Same request and seed give the same tokens,
            whoever else is served.
        presence_penalty: subtracted once from the logit of each generated token, -2 to 2.
        frequency_penalty: subtracted for every time that a token was generated, -2 to 2.
        repetition_penalty: divides positive logits of tokens in prompt or answer, multiplies negative ones; above 0.
        logit_bias: token id to what is added to its logit, -100 to 100; -100 forbids the token.
        top_logprobs: log-probabilities of so many likeliest tokens come with each token, 0 to 20; None gives none.
            They are those of the model, before bias, penalties and temperature.

    Raises:
        ValueError: if a value is out of range or not finite.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    typical_p: float = 1.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    top_logprobs: int | None = None

    def __post_init__(self) -> None:
        _expect_between("temperature", self.temperature, 0, 100)
        _expect_share("top_p", self.top_p)
        _expect_share("typical_p", self.typical_p)
        _expect_between("top_k", self.top_k, -1, math.inf)
        _expect_between("min_p", self.min_p, 0, 1)
        _expect_between("presence_penalty", self.presence_penalty, -2, 2)
        _expect_between("frequency_penalty", self.frequency_penalty, -2, 2)
        if not 0 < self.repetition_penalty <= 100:
            raise ValueError(f"repetition_penalty must be above 0 and at most 100; got {self.repetition_penalty}")
        if self.seed is not None and not 0 <= self.seed < SEED_LIMIT:
            raise ValueError(f"seed must be 0 or more and below 2**64; got {self.seed}")
        if len(self.logit_bias) > MOST_BIASED:
            raise ValueError(f"logit_bias names {len(self.logit_bias)} tokens; at most {MOST_BIASED} are accepted")
        for token_id, bias in self.logit_bias.items():
            _expect_between(f"logit_bias of token {token_id}", bias, -100, 100)
        if self.top_logprobs is not None:
            _expect_between("top_logprobs", self.top_logprobs, 0, MOST_TOP_LOGPROBS)

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """One continuation to generate.

    Args:
        prompt_ids: token ids of the prompt, at least one.
        max_new_tokens: most tokens to generate, 1 or more. This many are reserved in the KV pool.
        sampling: how tokens are chosen.
        stop_ids: tokens that end the answer besides the model's own end tokens. The token that ends it is reported
            and counted.
        ignore_end: whether the model's own end tokens do not end the answer.
        is_stop: asked in the engine's thread with every token that was generated; true ends the answer as `stop`. The
            place for stop strings: no further step is computed. It must be quick; an exception fails this request.
        constraint: grammar of the answer, or None.
        owner: who asks. Kept prefixes are shared only within one owner, and owners take turns in the queue.

    Raises:
        ValueError: if there is no prompt, or a number is out of range.
    """

    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop_ids: frozenset[int] = frozenset()
    ignore_end: bool = False
    is_stop: Callable[[int], bool] | None = None
    constraint: TokenConstraint | None = None
    owner: str = ""

    def __post_init__(self) -> None:
        if not self.prompt_ids:
            raise ValueError("the prompt is empty; give at least one token")
        if min(self.prompt_ids) < 0:
            raise ValueError(f"token ids must be 0 or more; got {min(self.prompt_ids)}")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be 1 or more; got {self.max_new_tokens}")

    @property
    def num_reserved(self) -> int:
        """Tokens of KV cache that the request needs at most; the last token is never read back."""
        return len(self.prompt_ids) + self.max_new_tokens - 1


def _expect_between(name: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:  # NaN compares false
        raise ValueError(f"{name} must be {least} to {most}; got {value}")


def _expect_share(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise ValueError(f"{name} must be above 0 and at most 1; got {value}")
