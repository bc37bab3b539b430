"""How `generate` chooses tokens and when it ends, by the engine's sampler and our stop strings."""

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import LogitsProcessor, StoppingCriteria

from ..engine.request import Sampling
from ..engine.sampling import Sampler
from .live_text import LiveText


@dataclass(frozen=True, kw_only=True)
class Choice:
    """How tokens are chosen, and what ends the text.

    Args:
        sampling: as the engine has it: the same seed gives what `serve` answers.
        stops: the text ends before the first of these strings.
    """

    sampling: Sampling = field(default_factory=Sampling)
    stops: tuple[str, ...] = ()


class SampledToken(LogitsProcessor):  # type: ignore[misc]
    """Leaves `generate` one token to choose: the sampler's.

    Args:
        sampler: of one sequence.
    """

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        event = self._sampler.choose(scores[0].cpu())
        only = torch.full_like(scores, -torch.inf)
        only[0, event.token_id] = 0.0
        return only


class StopsWith(StoppingCriteria):  # type: ignore[misc]
    """Ends when a stop string has come.

    Args:
        live: has seen the last token already: `generate` gives it out before it asks whether to stop.
    """

    def __init__(self, live: LiveText) -> None:
        self._live = live

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self._live.is_stopped, device=input_ids.device)
