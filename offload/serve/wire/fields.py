"""Fields that requests of several endpoints share, and what the engine makes of them."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from ...engine.request import MOST_BIASED, Sampling
from ..asks import Grammar, Limits, ToolUse

MOST_ANSWERS = 4
"""Answers to one prompt (`n`)."""
MOST_STOPS, LONGEST_STOP = 16, 256
"""Stop strings of a request, and characters of one: each new piece of text is searched for all of them. Not tuned."""
MOST_TOOLS = 128
"""Tools of a request; the hosted interfaces allow as many."""
SAMPLING = (
    *("temperature", "top_p", "top_k", "min_p", "typical_p"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty"),
)
BIAS: dict[str, Any] = {
    "propertyNames": {"pattern": "^[0-9]+$"},
    "additionalProperties": {"minimum": -100, "maximum": 100},
    "maxProperties": MOST_BIASED,
}
"""The ranges of `logit_bias` in the schema; `Sampling` checks them."""
NO_SEED = -1
"""vLLM and llama-server read this seed as none."""
NAME = r"^[A-Za-z0-9_.:/-]{1,128}$"


def _whole(value: Any) -> Any:
    """A whole number however it is written: 5.0 is an integer of JSON."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


WHOLE = BeforeValidator(_whole)
Integer = Annotated[int, WHOLE]


def _documented(**limits: float) -> Any:
    """A field whose range the engine checks: `Sampling` says what is wrong in words of its own."""
    return Field(default=None, json_schema_extra=limits)


LONGEST_TIMEOUT_S = 86400.0
"""Seconds of a request's time limit at most: a day."""

Timeout = Annotated[
    float | None,
    Field(gt=0, le=LONGEST_TIMEOUT_S, description="Seconds after which the answer ends with what there is of it."),
]
Stop = Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]


class Wire(BaseModel):
    """A JSON object of a request: types are exact, unknown fields are left out."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False, populate_by_name=True)


class StreamOptions(Wire):
    """What a stream has besides the answer."""

    include_usage: bool | None = None


class Sampled(Wire):
    """How tokens are chosen, as OpenAI, vLLM and llama.cpp name it. Fields that are null have their default."""

    temperature: float | None = _documented(minimum=0, maximum=100)
    top_p: float | None = _documented(exclusiveMinimum=0, maximum=1)
    top_k: Integer | None = _documented(minimum=-1)
    min_p: float | None = _documented(minimum=0, maximum=1)
    typical_p: float | None = _documented(exclusiveMinimum=0, maximum=1)
    seed: Integer | None = None
    presence_penalty: float | None = _documented(minimum=-2, maximum=2)
    frequency_penalty: float | None = _documented(minimum=-2, maximum=2)
    repetition_penalty: float | None = _documented(exclusiveMinimum=0, maximum=100)
    repeat_penalty: float | None = Field(
        default=None,
        description="Ollama's name of repetition_penalty.",
        json_schema_extra={"exclusiveMinimum": 0, "maximum": 100},
    )
    logit_bias: dict[str, float] | None = Field(default=None, json_schema_extra=BIAS)
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    ignore_eos: bool | None = None
    timeout: Timeout = None

    @field_validator("logit_bias")
    @classmethod
    def _expect_ids(cls, bias: dict[str, float] | None) -> dict[str, float] | None:
        for token in bias or ():
            if not token.isdecimal():
                raise ValueError(f"keys must be token ids; got {token!r}")
        return bias

    def sampling(self, defaults: Mapping[str, float], top_logprobs: int | None = None) -> Sampling:
        """The engine's sampling.

        Args:
            defaults: what holds for fields that the request does not name.
            top_logprobs: as in Sampling.

        Raises:
            ValueError: if a value is out of range; the message begins with the field's name.
        """
        given = {name: value for name in SAMPLING if (value := getattr(self, name)) is not None}
        if self.repeat_penalty is not None:
            given.setdefault("repetition_penalty", self.repeat_penalty)
        return Sampling(
            seed=None if self.seed in (None, NO_SEED) else self.seed % (1 << 64),
            logit_bias={int(token): bias for token, bias in (self.logit_bias or {}).items()},
            top_logprobs=top_logprobs,
            **{"temperature": 1.0, **defaults, **given},
        )

    def limits(self, sampling: Sampling, max_new_tokens: int | None, owner: str) -> Limits:
        """How to generate.

        Args:
            sampling: of this request.
            max_new_tokens: most tokens, or None.
            owner: who asks.
        """
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return Limits(
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stops=tuple(stops),
            ignore_end=bool(self.ignore_eos),
            owner=owner,
            time_limit_s=self.timeout,
        )


class JsonSchema(Wire):
    """A named JSON schema."""

    name: str | None = None
    schema_: dict[str, Any] = Field(default_factory=dict, alias="schema")
    strict: bool | None = None
    description: str | None = None


class ResponseFormat(Wire):
    """The form of an answer: text, any JSON object, or what matches a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema", description="llama-server's place for it.")

    def grammar(self) -> Grammar | None:
        """The grammar of the answer; None for free text.

        Raises:
            ValueError: if a schema is announced and missing.
        """
        return json_grammar(self.type, self.schema_ if self.json_schema is None else self.json_schema.schema_)


def json_grammar(kind: str, schema: Mapping[str, Any] | None) -> Grammar | None:
    """The grammar that a format of type `text`, `json_object` or `json_schema` stands for.

    Raises:
        ValueError: if a schema is announced and missing.
    """
    import json

    if kind == "text":
        return None
    if schema is None and kind == "json_schema":
        raise ValueError("response_format of type json_schema needs json_schema with a schema")
    return Grammar(kind="json_schema", source=json.dumps(schema or {"type": "object"}))


class Function(Wire):
    """A function that the model may call."""

    name: Annotated[str, Field(pattern=NAME)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Wire):
    """A tool; only functions are known."""

    type: Literal["function"] = "function"
    function: Function


class NamedFunction(Wire):
    name: str


class NamedTool(Wire):
    """The one tool to call."""

    type: Literal["function"] = "function"
    function: NamedFunction


def tool_use(
    tools: list[Tool] | None, choice: Literal["auto", "none", "required"] | NamedTool | None, is_parallel: bool | None
) -> ToolUse:
    """Tools of a request, and what may be called of them."""
    shown = tuple(tool.model_dump(exclude_none=True) for tool in tools or ())
    if isinstance(choice, NamedTool):
        return ToolUse(tools=shown, choice="named", name=choice.function.name)
    return ToolUse(tools=shown, choice=choice or "auto", is_parallel=is_parallel is not False)
