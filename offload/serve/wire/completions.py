"""`/v1/completions`: continues texts or token ids."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field, model_validator

from ...engine.events import TokenEvent
from ..answers import Delta, Ended, Said
from ..asks import Ask, Asker
from .chat import finish_reason
from .fields import MOST_ANSWERS, WHOLE, Integer, ResponseFormat, Sampled, StreamOptions
from .usage import usage_of

MOST_PROMPTS = 16
"""Prompts of one request; each takes a place of its own in the queue. Not tuned."""
Words = Annotated[str, Field(min_length=1)]
Ids = Annotated[list[int], Field(min_length=1)]
Spell = Callable[[TokenEvent], dict[str, Any]]


class CompletionRequest(Sampled):
    """A request of `/v1/completions`."""

    model: str | None = None
    prompt: Words | Ids | Annotated[list[Words] | list[Ids], Field(min_length=1, max_length=MOST_PROMPTS)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int | None, Field(ge=1), WHOLE] = 16
    n: Annotated[int | None, Field(ge=1, le=MOST_ANSWERS), WHOLE] = None
    best_of: Integer | None = None
    logprobs: Annotated[int | None, Field(ge=0, le=20), WHOLE] = None
    echo: bool | None = None
    suffix: str | None = None
    response_format: ResponseFormat | None = None

    @model_validator(mode="after")
    def _expect_known(self) -> "CompletionRequest":
        if self.suffix:
            raise ValueError("suffix: not supported; write the prompt in the model's own form for insertions")
        if self.best_of not in (None, 1, self.n or 1):
            raise ValueError("best_of: only the value of n is supported")
        if len(self.prompts) * (self.n or 1) > MOST_PROMPTS:
            raise ValueError(f"prompt: at most {MOST_PROMPTS} answers per request")
        return self

    @property
    def prompts(self) -> list[str | Sequence[int]]:
        """Each prompt."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)

    def asks(self, asker: Asker, *, defaults: Mapping[str, float], owner: str) -> list[Ask]:
        """What is asked, one for each prompt.

        Raises:
            ValueError: if a value is out of range, or a prompt has tokens that the model does not know.
        """
        sampling = self.sampling(defaults, self.logprobs)
        limits = self.limits(sampling, self.max_tokens, owner)
        grammar = None if self.response_format is None else self.response_format.grammar()
        return [asker.text(prompt, limits, grammar) for prompt in self.prompts]


class CompletionWriter:
    """Writes the answers to one request.

    Args:
        request_id: the answer's id.
        model: name that the client knows the model by.
        request: what was asked.
        prompts: text of each prompt, for `echo`.
        spell: writes a token's log-probabilities.
    """

    def __init__(
        self, request_id: str, model: str, request: CompletionRequest, prompts: Sequence[str], spell: Spell
    ) -> None:
        self._head = {
            "id": f"cmpl-{request_id}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": None,
        }
        self._request, self._spell = request, spell
        self._echoes = [text if request.echo else "" for text in prompts for _ in range(request.n or 1)]
        self._num_prompts = len(prompts)
        self._has_usage = bool(request.stream_options and request.stream_options.include_usage)
        self._lengths = [len(echo) for echo in self._echoes]
        self._ended: list[Ended] = []

    def begin(self) -> list[dict[str, Any]]:
        """The first chunks: the prompts, if they are echoed."""
        return [self._chunk(index, echo) for index, echo in enumerate(self._echoes) if echo]

    def chunks(self, index: int, delta: Delta) -> list[dict[str, Any]]:
        """The chunks of a stream that a delta of answer `index` makes."""
        if isinstance(delta, Said):
            logprobs = self._logprobs(delta.tokens, self._lengths[index])
            self._lengths[index] += len(delta.text)
            return [self._chunk(index, delta.text, logprobs=logprobs)] if delta.text or logprobs else []
        if isinstance(delta, Ended):
            self._ended.append(delta)
            return [self._chunk(index, "", finish_reason=finish_reason(delta))]
        return []

    def end(self) -> list[dict[str, Any]]:
        """The last chunk, if the request wants to know the usage."""
        usage = usage_of(self._ended, self._num_prompts)
        return [{**self._head, "choices": [], "usage": usage}] if self._has_usage else []

    def whole(self, answers: list[list[Delta]]) -> dict[str, Any]:
        """The answers as one object."""
        ended = [delta for deltas in answers for delta in deltas if isinstance(delta, Ended)]
        choices = [self._choice(index, deltas) for index, deltas in enumerate(answers)]
        return {**self._head, "choices": choices, "usage": usage_of(ended, self._num_prompts)}

    def _choice(self, index: int, deltas: list[Delta]) -> dict[str, Any]:
        said = [delta for delta in deltas if isinstance(delta, Said)]
        echo = self._echoes[index]
        tokens = [token for piece in said for token in piece.tokens]
        (ended,) = (delta for delta in deltas if isinstance(delta, Ended))
        return {
            "index": index,
            "text": echo + "".join(piece.text for piece in said),
            "logprobs": self._logprobs(tokens, len(echo)),
            "finish_reason": finish_reason(ended),
        }

    def _chunk(self, index: int, text: str, **rest: Any) -> dict[str, Any]:
        choice = {"index": index, "text": text, "logprobs": None, "finish_reason": None, **rest}
        return {**self._head, "choices": [choice], **({"usage": None} if self._has_usage else {})}

    def _logprobs(self, tokens: Sequence[TokenEvent], offset: int) -> dict[str, Any] | None:
        """Log-probabilities in the older form: lists beside each other."""
        if self._request.logprobs is None or not tokens:
            return None
        spelled = [self._spell(token) for token in tokens]
        offsets = []
        for entry in spelled:
            offsets.append(offset)
            offset += len(entry["token"])
        return {
            "tokens": [entry["token"] for entry in spelled],
            "token_logprobs": [entry["logprob"] for entry in spelled],
            "top_logprobs": [{top["token"]: top["logprob"] for top in entry["top_logprobs"]} for entry in spelled],
            "text_offset": offsets,
        }
