"""The parts of an engine put together for one model: what it can hold, and what its level of exactness allows."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from routing.ground.model_config import experts_per_token, text_config
from routing.ground.quantity import parse_size

from ..compute.resident import embedding_bytes, weight_bytes
from ..memory.budget import kv_bytes_per_token
from ..prefetch.foreseen import can_foresee, foreseen_experts
from ..runtime.activations import prefill_tokens
from .admission import Admission, places_of
from .counters import Tally
from .kept.cached import is_plain
from .kept.folder import PrefixFolder
from .kept.prefixes import Prefixes
from .loop import Loop
from .options import EngineOptions
from .planning.likeness import LikeFirst
from .planning.pool import TokenPool
from .planning.rates import ExpertLoad
from .planning.schedule import Schedule
from .step import ModelSteps

ROWS_INDEPENDENT = ("fixed",)
"""Arithmetics in which the bits of a row do not depend on the rows beside it."""
FREE_ORDER = ("fast",)
"""Arithmetics that promise no bits."""


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """What callers need to know of a model that is served.

    Args:
        vocab_size: V; larger ids are refused.
        context_tokens: tokens of prompt and answer that one request may have: the KV pool, or what the model was made
            for if that is less.
        end_ids: tokens that end an answer.
        arithmetic: what the model was loaded with.
        can_pack: whether several users' tokens may be computed in one step.
        reuse: `any`, `aligned` or `off`, what kept prefixes are used for.
    """

    vocab_size: int
    context_tokens: int
    end_ids: frozenset[int]
    arithmetic: str
    can_pack: bool
    reuse: str


def build_loop(model: Any, options: EngineOptions, tally: Tally) -> tuple[Loop, ModelInfo]:
    """The loop of a model that `offload.load` gave.

    Raises:
        ValueError: if the model's family cannot be served, or it records its routing.
    """
    if model.offload.runtime.recorder is not None:
        raise ValueError("a model that records its routing serves one sequence; load it without record_trace")
    steps = ModelSteps(model)
    arithmetic = model.offload.runtime.matvecs.arithmetic
    is_flexible = arithmetic in (*ROWS_INDEPENDENT, *FREE_ORDER)
    wants_to_pack = is_flexible or options.schedule == "together" or options.lookup == "always"
    can_pack = wants_to_pack and steps.can_pack
    reuse = options.reuse if options.reuse != "auto" else "any" if is_flexible else "aligned"
    capacity, token_bytes = _pool_tokens(model)
    context = _longest(capacity)
    piece_tokens = min(options.piece_tokens or context, prefill_tokens(model.config, context))
    admission = Admission(
        steps,
        TokenPool(capacity),
        Prefixes(token_bytes),
        options,
        piece_tokens=piece_tokens,
        reuse=reuse,
        looks_up=can_pack and options.lookup != "off" and is_plain(steps.empty().cache),
        folder=_folder(model, steps, options) if reuse != "off" else None,
        tally=tally,
        likeness=_likeness(model) if options.order == "auto" else None,
    )
    schedule = Schedule(
        options.schedule,
        _load(model),
        longest_wait_s=options.longest_wait_s,
        decode_share=options.decode_share,
        may_pack=can_pack,
        piece_tokens=piece_tokens,
    )
    info = ModelInfo(
        vocab_size=steps.vocab_size,
        context_tokens=min(context, _most_positions(model.config, capacity)),
        end_ids=_end_ids(model),
        arithmetic=arithmetic,
        can_pack=can_pack,
        reuse=reuse,
    )
    return Loop(steps, admission, schedule, piece_tokens=piece_tokens, tally=tally), info


def _likeness(model: Any) -> LikeFirst | None:
    """The order by foreseen experts; None where nothing foresees them."""
    if not can_foresee(model):
        return None

    def foresee(prompt_ids: Sequence[int]) -> NDArray[np.bool_]:
        _, signature = foreseen_experts(model, [prompt_ids])
        assert signature is not None
        return signature[0]

    return LikeFirst(foresee)


def _folder(model: Any, steps: ModelSteps, options: EngineOptions) -> PrefixFolder | None:
    if options.prefix_folder is None:
        return None
    return PrefixFolder(options.prefix_folder, parse_size(options.prefix_disk), model, steps.empty)


def _pool_tokens(model: Any) -> tuple[int, int]:
    """Tokens that the budget's KV cache holds, and bytes of one.

    Raises:
        ValueError: if no memory was set aside for any.
    """
    token_bytes = kv_bytes_per_token(model.config, model.dtype.itemsize)
    if token_bytes == 0:  # nothing but states, which do not grow with the tokens
        return _most_positions(model.config, 1 << 20), 1
    return model.offload.plan.kv_bytes // token_bytes, token_bytes


def _longest(capacity: int) -> int:
    """Tokens of the longest sequence that the pool has places for."""
    return bisect_right(range(capacity + 1), capacity, key=places_of) - 1


def _most_positions(config: Any, otherwise: int) -> int:
    return int(getattr(text_config(config), "max_position_embeddings", None) or otherwise)


def _end_ids(model: Any) -> frozenset[int]:
    """The model's end tokens, from its generation config or its config."""
    given = getattr(model.generation_config, "eos_token_id", None)
    if given is None:
        given = getattr(text_config(model.config), "eos_token_id", None)
    return frozenset([] if given is None else [given] if isinstance(given, int) else given)


def _load(model: Any) -> ExpertLoad:
    layers = model.offload.runtime.layers
    if not layers:  # a dense model: nothing is read, so nobody throws anything out
        return ExpertLoad(num_experts=1, top_k=1, slots=1.0, expert_share=0.0)
    top_k = experts_per_token(model.config)
    expert_bytes = top_k * sum(slots.expert_bytes for slots in layers)
    resident_bytes = weight_bytes(model) - embedding_bytes(model)
    return ExpertLoad(
        num_experts=max(slots.num_experts for slots in layers),
        top_k=top_k,
        slots=sum(slots.num_slots for slots in layers) / len(layers),
        expert_share=expert_bytes / max(expert_bytes + resident_bytes, 1),
    )
