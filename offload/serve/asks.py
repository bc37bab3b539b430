"""What a caller wants of a model, made ready for the engine: from messages or a text to token ids and a grammar."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ..engine.request import Sampling
from ..text.bare_calls import BareCalls
from ..text.channels import Channels, MarkedChannels
from ..text.conversation import Conversations
from ..text.reply_format import ReplyFormat, format_of
from ..text.vocabulary import Vocabulary

PROMPT_END_TOKENS = 16
"""Tokens at a prompt's end that are looked at for a mark of reasoning that the template wrote."""


@dataclass(frozen=True, kw_only=True)
class Grammar:
    """What an answer must match.

    Args:
        kind: what `source` is: a JSON schema, a regular expression, or a Lark grammar of llguidance.
        source: the text of it; of a schema its JSON.
    """

    kind: Literal["json_schema", "regex", "lark"]
    source: str


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How an answer is generated, besides what its prompt is.

    Args:
        max_new_tokens: most tokens to generate; None or more than there is room for: as many as there is room for.
        sampling: how tokens are chosen.
        stops: the answer ends before the first of these strings.
        ignore_end: whether end tokens do not end it.
        owner: who asks; kept prefixes are shared within one owner only.
        time_limit_s: seconds, queue included, after which the answer ends with what there is; None: no limit.
    """

    max_new_tokens: int | None = None
    sampling: Sampling = field(default_factory=Sampling)
    stops: tuple[str, ...] = ()
    ignore_end: bool = False
    owner: str = ""
    time_limit_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One answer to generate, and how to read it.

    Args:
        prompt_ids: token ids of the prompt.
        max_new_tokens: most tokens to generate, 1 or more.
        limits: how else to generate.
        prompt_end: the prompt's last words with control tokens; they may have opened a reasoning.
        format: marks of reasoning and calls in the answer.
        tools: JSON schema of each tool's arguments, by its name; empty if nothing may be called.
        is_call: whether the answer must be a call as bare JSON, as the grammar says.
        grammar: what the answer must match, or None.
    """

    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    limits: Limits
    prompt_end: str = ""
    format: ReplyFormat = field(default_factory=ReplyFormat)
    tools: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    is_call: bool = False
    grammar: Grammar | None = None

    def channels(self) -> Channels:
        """A splitter for the answer."""
        if self.is_call and not self.format.is_harmony:
            region = self.format.opened_by(self.prompt_end)
            return BareCalls(MarkedChannels([] if region is None else [region], region))
        split = self.format.channels(self.prompt_end, is_calling=bool(self.tools))
        return BareCalls(split) if self.is_call or (self.tools and not self.format.has_calls) else split

    def nth(self, index: int) -> "Ask":
        """The same ask for another of several answers: with a seed of its own, if it has one."""
        sampling = self.limits.sampling
        if sampling.seed is None or not index:
            return self
        seeded = replace(sampling, seed=(sampling.seed + index) % (1 << 64))
        return replace(self, limits=replace(self.limits, sampling=seeded))


@dataclass(frozen=True, kw_only=True)
class ToolUse:
    """The tools of a conversation, and which of them the answer may or must call.

    Args:
        tools: as the OpenAI interface has them: `{"type": "function", "function": {"name", "parameters"}}`.
        choice: `auto`: the model decides; `none`: no call; `required`: some call; `named`: a call of the tool `name`.
        name: of the tool to call.
        is_parallel: whether several calls may be forced at once.
    """

    tools: tuple[Mapping[str, Any], ...] = ()
    choice: Literal["auto", "none", "required", "named"] = "auto"
    name: str = ""
    is_parallel: bool = True

    @property
    def schemas(self) -> dict[str, Mapping[str, Any]]:
        """Schemas of arguments by name."""
        return {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in self.tools}

    @property
    def forced(self) -> Grammar | None:
        """The grammar of an answer that must be a call; None if it need not be one.

        Raises:
            ValueError: if a call is wanted and there is no such tool.
        """
        if self.choice in ("auto", "none"):
            return None
        schemas = self.schemas
        wanted = schemas if self.choice == "required" else {self.name: schemas.get(self.name)}
        if not schemas or None in wanted.values():
            what = f"the tool {self.name!r}" if self.choice == "named" else "a call"
            raise ValueError(f"tool_choice wants {what}, and tools has {', '.join(schemas) or 'none'}")
        calls = [_call_schema(name, schema) for name, schema in wanted.items()]
        one = calls[0] if len(calls) == 1 else {"anyOf": calls}
        is_list = self.choice == "required" and self.is_parallel
        schema = {"type": "array", "items": one, "minItems": 1} if is_list else one
        return Grammar(kind="json_schema", source=json.dumps(schema))


def _call_schema(name: str, arguments: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"name": {"const": name}, "arguments": {"type": "object", **arguments}},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


class Asker:
    """Makes asks for one model; its functions take milliseconds to seconds and belong into a worker thread.

    Args:
        vocabulary: its tokens.
        conversations: its chat template.
        context: tokens, of a prompt and its answer, that one request may have.
        max_output: most tokens of one answer.
    """

    def __init__(
        self, vocabulary: Vocabulary, conversations: Conversations, context: int, max_output: int | None = None
    ) -> None:
        self.vocabulary, self.conversations, self.context = vocabulary, conversations, context
        self._max_output = max_output or context
        self.format = format_of(conversations.text)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        limits: Limits,
        *,
        use: ToolUse | None = None,
        grammar: Grammar | None = None,
        settings: Mapping[str, Any] | None = None,
        is_continued: bool = False,
    ) -> Ask:
        """The answer to a conversation.

        Args:
            messages: as `Conversations.render` takes them.
            limits: how to generate.
            use: tools, and what may be called.
            grammar: what the answer must match, if no call is forced.
            settings: variables of the template.
            is_continued: whether the last message is the beginning of the answer.

        Raises:
            ContextFull: if the prompt leaves no room for an answer.
            ValueError: if the template refuses the messages, a tool is wanted that is not there, or a bias is of none.
        """
        use = use or ToolUse()
        forced = use.forced
        # with choice none the tools stay in the prompt: its beginning is the same as in the turns that may call
        ids = self.conversations.render(messages, tools=use.tools, settings=settings, is_continued=is_continued)
        return Ask(
            prompt_ids=tuple(self.vocabulary.checked(ids)),
            max_new_tokens=self._room(ids, limits),
            limits=limits,
            prompt_end=self.vocabulary.spell(ids[-PROMPT_END_TOKENS:]),
            format=self.format,
            tools={} if use.choice == "none" else use.schemas,
            is_call=forced is not None,
            grammar=forced or grammar,
        )

    def text(self, prompt: str | Sequence[int], limits: Limits, grammar: Grammar | None = None) -> Ask:
        """The continuation of a raw text, or of token ids.

        Raises:
            ContextFull: if the prompt leaves no room for an answer.
            ValueError: if the prompt is empty or holds tokens that the model does not know.
        """
        ids = self.vocabulary.encode(prompt) if isinstance(prompt, str) else self.vocabulary.checked(prompt)
        return Ask(prompt_ids=tuple(ids), max_new_tokens=self._room(ids, limits), limits=limits, grammar=grammar)

    def _room(self, ids: Sequence[int], limits: Limits) -> int:
        """Most tokens of the answer: what is wished, within what there is room for."""
        if unknown := next((one for one in limits.sampling.logit_bias if one >= self.vocabulary.vocab_size), None):
            raise ValueError(f"logit_bias names token {unknown}; the model knows 0 to {self.vocabulary.vocab_size - 1}")
        left = self.context - len(ids)
        if left < 1:
            raise ContextFull(len(ids), self.context)
        return min(limits.max_new_tokens or self._max_output, self._max_output, left)


class ContextFull(ValueError):
    """A prompt leaves no room for an answer."""

    def __init__(self, prompt_tokens: int, context: int) -> None:
        super().__init__(
            f"This model's maximum context length is {context} tokens, and the prompt has {prompt_tokens} tokens. "
            "Shorten it, or serve the model with a larger --context."
        )
