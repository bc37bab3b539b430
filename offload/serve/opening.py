"""Opens a model with its tokenizer and template for many requests: what the server and the terminal chat share."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.model_folder import read_config
from ..compute.orders import orders
from ..engine.engine import Engine
from ..engine.options import EngineOptions
from ..memory.budget import MemoryPlan, describe
from ..runtime.loading import load
from ..text.conversation import Conversations
from ..text.reply_format import format_of
from ..text.vocabulary import Vocabulary
from .asks import Asker
from .text import open_tokenizer

DEFAULTS = ("temperature", "top_p", "top_k")
"""Sampling that a model's generation_config.json may recommend."""


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A model that answers.

    Args:
        engine: generates; it owns the model.
        asker: makes asks of messages and texts.
        defaults: sampling that the model's makers recommend; empty if they do not.
        budget: bytes of memory by part.
        note: what a user should know, such as that there is no chat template; empty if there is nothing.
    """

    engine: Engine
    asker: Asker
    defaults: Mapping[str, float]
    budget: Mapping[str, int]
    note: str


def open_conversations(folder: Path, template: str | None) -> Conversations:
    """The tokenizer and the chat template of a model folder; checked before the weights are read.

    Raises:
        ValueError: if the tokenizer cannot be read.
    """
    vocab_size = int(read_config(folder).get_text_config().vocab_size)
    return Conversations(open_tokenizer(folder, vocab_size), template)


def open_answering(
    folder: Path,
    conversations: Conversations,
    options: EngineOptions,
    load_options: Mapping[str, Any],
    *,
    context: int,
    loaded: Any = None,
    open_with: Callable[..., Any] = load,
) -> Opened:
    """Load a model and start its engine; takes as long as reading all that is not experts.

    Args:
        folder: of the model, or its GGUF file.
        conversations: its template and tokenizer.
        options: places, queue and memory of the engine.
        load_options: of `offload.load`; `auto` arithmetic becomes `fixed`: several users' tokens can then be computed
            together, and each gets the answer that he would get alone.
        context: most tokens of one request, prompt and answer together.
        loaded: the model, if it is loaded already; the engine owns it from now on.
        open_with: takes the arguments of `offload.load`.

    Raises:
        ValueError: as `offload.load`, and for families that the engine cannot serve.
    """
    found: dict[str, Any] = {}

    def open_model() -> Any:
        arithmetic = arithmetic_for_many(load_options.get("arithmetic", "auto"))
        options = {**load_options, "arithmetic": arithmetic}
        model = open_with(folder, **options) if loaded is None else loaded
        found.update(defaults=_recommended(model), budget=_parts(model.offload.plan))
        return model

    engine = Engine(open_model, options)
    engine.wait_ready()
    info = engine.model_info
    marks = format_of(conversations.text).marks
    vocabulary = Vocabulary(conversations.tokenizer, info.vocab_size, info.end_ids, marks)
    asker = Asker(vocabulary, conversations, min(context, info.context_tokens), options.most_new_tokens)
    note = f"{folder} has no chat template: messages are written as `role: text`, line by line"
    return Opened(engine=engine, asker=asker, note=note if conversations.is_plain else "", **found)


def _parts(plan: MemoryPlan) -> dict[str, int]:
    """Bytes of a memory plan, by part."""
    sizes = {name: size for name, size in describe(plan).items() if name.endswith("_bytes") and isinstance(size, int)}
    return {name.removesuffix("_bytes"): size for name, size in sizes.items()}


def arithmetic_for_many(arithmetic: str) -> str:
    """The level that several users get if they ask for `auto`: each the bits that he would get alone."""
    try:
        orders()
    except OSError:  # without a C compiler torch computes, and its bits depend on how many rows there are
        return arithmetic
    return "fixed" if arithmetic == "auto" else arithmetic


def _recommended(model: Any) -> dict[str, float]:
    config = model.generation_config
    if config is None or not config.do_sample:
        return {}
    return {name: value for name in DEFAULTS if (value := getattr(config, name, None)) is not None}
