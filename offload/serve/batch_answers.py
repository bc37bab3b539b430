"""Answers to many prompts in batches of those that use the same experts, computed together by an engine.

Source: He et al. 2024 (ExpertFlow), arXiv:2410.17954, section on token scheduling.

Shapes: N prompts, L MoE layers, E experts.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..engine.engine import Engine
from ..engine.events import Finished
from ..engine.options import EngineOptions
from ..engine.request import GenerationRequest
from ..engine.stream import Stream
from ..prefetch.foreseen import foreseen_experts
from ..text.pieces import TextPieces
from ..text.stops import StopStrings
from .batches import experts_touched, form_batches, in_order
from .choosing import Choice
from .live_text import Text


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One prompt of a file, ready for an engine.

    Args:
        prompt_ids: its tokens.
        max_new_tokens: most tokens of the answer.
        choice: how tokens are chosen, and what ends the text.
    """

    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    choice: Choice


@dataclass(frozen=True, kw_only=True)
class FormedBatches:
    """Batches, and what is known of them before anything is computed.

    Args:
        batches: prompts of each, by place.
        foreseen_by: what says which experts a prompt uses; empty if nothing does, and batches are in order.
        experts_before, experts_after: mean experts of all layers that a batch is foreseen to use, in order and formed.
    """

    batches: list[list[int]]
    foreseen_by: str = ""
    experts_before: float = 0.0
    experts_after: float = 0.0

    def __str__(self) -> str:
        if not self.foreseen_by:
            return f"{len(self.batches)} batches in order: nothing foresees the experts of these prompts"
        return (
            f"{len(self.batches)} batches by {self.foreseen_by}: {self.experts_after:.1f} experts foreseen per batch, "
            f"{self.experts_before:.1f} in order"
        )


def form(model: Any, prompts: Sequence[Sequence[int]], batch_size: int) -> FormedBatches:
    """Batches of prompts that are foreseen to use the same experts.

    Args:
        model: of `load`; a router over token ids foresees exactly, a predictor of passes as well as it can.
        prompts: their token ids.
        batch_size: prompts of a batch, 1 or more.
    """
    plain = in_order(len(prompts), batch_size)
    foreseen_by, signature = foreseen_experts(model, prompts)
    if signature is None:
        return FormedBatches(batches=plain)
    formed = form_batches(signature, batch_size)
    return FormedBatches(
        batches=formed,
        foreseen_by=foreseen_by,
        experts_before=float(np.mean(experts_touched(signature, plain))),
        experts_after=float(np.mean(experts_touched(signature, formed))),
    )


def answer_batches(
    model: Any, text: Text, asked: Sequence[Asked], batches: Sequence[Sequence[int]]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Answers batch by batch, by place; the model belongs to an engine meanwhile, and is closed at the end.

    Args:
        model: of `load`.
        text: turns tokens into text.
        asked: what is answered, with tokens and limits; at least one.
        batches: places of `asked`.

    Raises:
        ValueError: if the engine cannot serve the model's family, or a prompt has no room.
        RuntimeError: if an answer fails.
    """
    size, longest = max(map(len, batches)), max(each.max_new_tokens for each in asked)
    options = EngineOptions(most_users=size, most_queued=size, most_new_tokens=longest)
    with Engine(lambda: model, options) as engine:
        engine.wait_ready()
        for batch in batches:
            answers = [(place, _Answer(text, asked[place])) for place in batch]
            streams = [answer.submit(engine) for _, answer in answers]
            for (place, answer), stream in zip(answers, streams, strict=True):
                yield place, answer.wait(stream)


@dataclass
class _Answer:
    """One answer while it comes."""

    text: Text
    asked: Asked
    token_ids: list[int] = field(default_factory=list)
    whole: str = ""

    def __post_init__(self) -> None:
        self._pieces, self._stops = TextPieces(self.text.decode), StopStrings(self.asked.choice.stops)

    def submit(self, engine: Engine) -> Stream:
        return engine.submit(
            GenerationRequest(
                prompt_ids=self.asked.prompt_ids,
                max_new_tokens=self.asked.max_new_tokens,
                sampling=self.asked.choice.sampling,
                is_stop=self._take,
            )
        )

    def wait(self, stream: Stream) -> dict[str, Any]:
        """The answer, once it is whole."""
        *_, last = stream
        assert isinstance(last, Finished)
        if last.reason in ("error", "cancelled"):
            raise RuntimeError(f"an answer failed: {last.message or last.reason}")
        self.whole += self._stops.put(self._pieces.end()) + self._stops.end()
        return {
            "text": self.whole,
            "finish_reason": last.reason,
            "prompt_tokens": len(self.asked.prompt_ids),
            "token_ids": self.token_ids,
        }

    def _take(self, token_id: int) -> bool:
        """In the engine's thread: one more token; whether a stop string has come."""
        self.token_ids.append(token_id)
        self.whole += self._stops.put(self._pieces.put(token_id))
        return self._stops.found is not None
