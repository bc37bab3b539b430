"""Chooses one request's next token, with random numbers of its own.

Shapes: V vocabulary.
"""

import secrets
from collections import Counter

import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from .events import TokenEvent
from .request import ConstraintError, GenerationRequest, Sampling


class Sampler:
    """The choice of tokens for one request; it depends on its logits and its seed alone.

    Args:
        request: says how to choose; its constraint, if it has one, is told each token.
    """

    def __init__(self, request: GenerationRequest) -> None:
        self._sampling, self._constraint = request.sampling, request.constraint
        self._prompt_ids = torch.tensor([sorted(set(request.prompt_ids))])
        self._counts: Counter[int] = Counter()
        seed = request.sampling.seed
        self._random = torch.Generator().manual_seed(secrets.randbits(63) if seed is None else seed)
        self._warpers = _warpers(request.sampling)

    def choose(self, logits_V: torch.Tensor) -> TokenEvent:
        """The next token, given the logits of the last one; later choices know of it.

        Raises:
            ValueError: if the logits are not numbers.
            ConstraintError: if no token is allowed.
        """
        logits_V = logits_V.float()
        if not torch.isfinite(logits_V.max()):  # the largest is NaN if any is
            raise ValueError("the model's logits are not numbers")
        score_V = self._constrained(logits_V)
        token_id = int(score_V.argmax()) if self._sampling.is_greedy else self._draw(score_V)
        if score_V[token_id] == -torch.inf:
            raise ConstraintError("no token is allowed here: logit_bias and grammar forbid all")
        event = self._event(token_id, logits_V)
        self._counts[token_id] += 1
        if self._constraint is not None:
            self._constraint.accept(token_id)
        return event

    def _constrained(self, logits_V: torch.Tensor) -> torch.Tensor:
        """The logits with bias, constraint and penalties."""
        sampling = self._sampling
        score_V = logits_V.clone()
        if sampling.logit_bias:
            ids = torch.tensor(list(sampling.logit_bias))
            bias = torch.tensor(list(sampling.logit_bias.values()), dtype=torch.float32)
            score_V[ids] += torch.where(bias <= -100, -torch.inf, bias)
        if self._constraint is not None:
            allowed_V = torch.zeros(len(score_V), dtype=torch.bool)
            given_V = torch.from_numpy(self._constraint.allowed_V())[: len(score_V)]
            allowed_V[: len(given_V)] = given_V
            score_V = score_V.masked_fill(~allowed_V, -torch.inf)
        seen = torch.tensor([list(self._counts)], dtype=torch.long)
        if sampling.repetition_penalty != 1:
            penalty = RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty))
            score_V = penalty(torch.cat([self._prompt_ids, seen], dim=1), score_V[None])[0]
        if self._counts and (sampling.presence_penalty or sampling.frequency_penalty):
            count = torch.tensor(list(self._counts.values()), dtype=torch.float32)
            score_V[seen[0]] -= sampling.presence_penalty + sampling.frequency_penalty * count
        return score_V

    def _draw(self, score_V: torch.Tensor) -> int:
        """One random number against the cumulated probabilities of what the warpers leave."""
        warped_V = self._warpers(None, score_V[None] / self._sampling.temperature)[0]
        chance_V = torch.softmax(warped_V.double(), dim=-1).cumsum(dim=-1)
        drawn = torch.rand((), generator=self._random, dtype=torch.float64) * chance_V[-1]
        return min(int(torch.searchsorted(chance_V, drawn, right=True)), len(chance_V) - 1)

    def _event(self, token_id: int, logits_V: torch.Tensor) -> TokenEvent:
        index, most = self._counts.total(), self._sampling.top_logprobs
        if most is None:
            return TokenEvent(index=index, token_id=token_id)
        logprob_V = logits_V.log_softmax(dim=-1)
        best = logprob_V.topk(most)
        return TokenEvent(
            index=index,
            token_id=token_id,
            logprob=float(logprob_V[token_id]),
            top_logprobs=tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True)),
        )


def _warpers(sampling: Sampling) -> LogitsProcessorList:
    """transformers' warpers for what the request asks for, in vLLM's order."""
    warpers = LogitsProcessorList()
    if sampling.min_p > 0:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    if sampling.top_k > 0:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.typical_p < 1:
        warpers.append(TypicalLogitsWarper(sampling.typical_p))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(float(sampling.top_p)))
    return warpers
