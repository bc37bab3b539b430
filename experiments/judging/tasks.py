"""Two tasks made of held-out text that small models fail or pass: choose a continuation, and copy a passage.

Shapes: B sequences, S positions, V vocabulary, N rows, K slots: the choices of an item.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe import MoEForCausalLM

from ..train.corpus import Corpus
from .equivalence import share_interval

ITEMS = 128
"""Per task: a 95 % interval of at most 17 points, at the price of two evaluations of 32,768 tokens."""
CHOICES, CONTINUATION = 4, 8
"""Continuations that are offered, and tokens of each: enough bytes for a word."""
SHARED = 2
"""Tokens before each wrong continuation that stand before the right one too, so that bigrams do not give it away."""
MOST_CONTEXT, MOST_COPIED = 96, 48
"""Tokens before a continuation, and of a passage to copy; shorter for models that were trained on less."""
TRIES = 20
"""Places that are tried per item before a text counts as too small for more."""
ROWS = 32
"""Sequences of a forward pass: logits of 32 times 104 bytes take 3 MB."""
SKIPPED = 4
"""First tokens of a copy that are not scored: until then nothing says that one has begun."""


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """How a task went.

    Args:
        hits, trials: right answers, of so many.
        chance: share of right answers of a model that does not do what the task asks for.
    """

    hits: int
    trials: int
    chance: float

    @property
    def share(self) -> float:
        return self.hits / self.trials

    @property
    def interval(self) -> tuple[float, float]:
        """95 %."""
        return share_interval(self.hits, self.trials)


def cloze(
    model: MoEForCausalLM, corpus: Corpus, *, sequence_length: int, seed: int = 0, num_items: int = ITEMS
) -> TaskResult | None:
    """Choose the continuation of a passage among four that follow the same two tokens somewhere in held-out text.

    Args:
        model: in evaluation mode.
        corpus: its held-out part makes the items; another seed makes others.
        sequence_length: S that the model was trained on; passages with their continuation are no longer.
        seed: draws the items, 0 or more.
        num_items: at most so many.

    Returns:
        How often the right one was the likeliest; None if the text is too small for an item.
    """
    stream = np.asarray(corpus.held_out, np.int64)
    context = min(MOST_CONTEXT, sequence_length - CONTINUATION)
    items = _cloze_items(stream, context, seed, num_items)
    if not items:
        return None
    rows = np.concatenate(items)
    parts = [rows[start : start + ROWS] for start in range(0, len(rows), ROWS)]
    nats_NK = torch.cat([_continuation_nats(model, part, context) for part in parts]).view(-1, CHOICES)
    is_likeliest_N = (nats_NK[:, :1] < nats_NK[:, 1:]).all(1)  # a tie is no answer
    return TaskResult(hits=int(is_likeliest_N.sum()), trials=len(items), chance=1 / CHOICES)


def copying(
    model: MoEForCausalLM, corpus: Corpus, *, sequence_length: int, seed: int = 0, num_items: int = ITEMS
) -> TaskResult | None:
    """Predict the tokens of a passage that has just been read: held-out text, twice in a row.

    Args:
        model, corpus, sequence_length, seed, num_items: as for `cloze`.

    Returns:
        Right tokens of the second copy; `chance` is the share of right ones of the first copy. None if the text is
        shorter than one passage.
    """
    stream = np.asarray(corpus.held_out, np.int64)
    length = min(MOST_COPIED, sequence_length // 2)
    if len(stream) < length or length <= SKIPPED:
        return None
    draws = np.random.default_rng(seed)
    starts = draws.integers(0, len(stream) - length + 1, num_items)
    rows = np.stack([np.tile(stream[start : start + length], 2) for start in starts])
    parts = [rows[start : start + ROWS] for start in range(0, len(rows), ROWS)]
    is_right_BS = torch.cat([_is_right(model, torch.from_numpy(part)) for part in parts])
    # position i says whether token i + 1 was predicted
    first, second = is_right_BS[:, SKIPPED - 1 : length - 1], is_right_BS[:, length + SKIPPED - 1 :]
    return TaskResult(hits=int(second.sum()), trials=second.numel(), chance=float(first.float().mean()))


def _cloze_items(stream: NDArray[np.int64], context: int, seed: int, num_items: int) -> list[NDArray[np.int64]]:
    """int64 [CHOICES, context + CONTINUATION] each, the right continuation first."""
    if context < SHARED or len(stream) < context + CONTINUATION:
        return []
    draws, items = np.random.default_rng(seed), []
    last = len(stream) - CONTINUATION
    pairs = stream[: last - 1] * (int(stream.max()) + 1) + stream[1:last]  # of the tokens before each continuation
    for place in draws.integers(context, last + 1, TRIES * num_items):
        found = _rivals(stream, pairs, int(place), draws)
        if found is not None:
            start = np.tile(stream[place - context : place], (CHOICES, 1))
            items.append(np.concatenate([start, found], axis=1))
        if len(items) == num_items:
            break
    return items


def _rivals(
    stream: NDArray[np.int64], pairs: NDArray[np.int64], place: int, draws: np.random.Generator
) -> NDArray[np.int64] | None:
    """int64 [CHOICES, CONTINUATION]: the continuation at a place and others after the same tokens, all different."""
    others = np.flatnonzero(pairs == pairs[place - SHARED]) + SHARED
    found = [stream[place : place + CONTINUATION]]
    for other in draws.permutation(others):
        one = stream[other : other + CONTINUATION]
        if all((one != kept).any() for kept in found):
            found.append(one)
        if len(found) == CHOICES:
            return np.stack(found)
    return None


@torch.no_grad()
def _continuation_nats(model: MoEForCausalLM, rows: NDArray[np.int64], context: int) -> Tensor:
    """Per row, the negative log-likelihood of its continuation."""
    token_BS = torch.from_numpy(rows).to(model.device)
    logits_BSV = model(token_BS, use_cache=False).logits[:, context - 1 : -1].float()
    target_BS = token_BS[:, context:]
    return -logits_BSV.log_softmax(-1).gather(2, target_BS[..., None]).sum((1, 2))


@torch.no_grad()
def _is_right(model: MoEForCausalLM, token_BS: Tensor) -> Tensor:
    """bool [B, S - 1]: whether the likeliest next token is the next one."""
    token_BS = token_BS.to(model.device)
    return (model(token_BS, use_cache=False).logits[:, :-1].argmax(-1) == token_BS[:, 1:]).cpu()
