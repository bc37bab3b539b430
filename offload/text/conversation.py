"""Renders a conversation as the token ids that a model was trained on, with its chat template.

Templates come with the model or from its owner, never from a request. They run in transformers' sandbox.
"""

import json
import re
from collections.abc import Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

from .vocabulary import control_ids

PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
"""For models without a template: names and texts, line by line."""
SETTINGS = ("enable_thinking", "thinking", "reasoning_effort", "thinking_budget", "builtin_tools")
"""Variables that a request may give to a template; nothing else of a request reaches it by name."""
GENERATION_TAG = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")
LARGEST_TEMPLATE = 1 << 20
"""Bytes of a template file. The longest in use has some 20,000."""


class Conversations:
    """Renders conversations for one model.

    Args:
        tokenizer: of transformers.
        template: Jinja text to use instead of the tokenizer's own.
    """

    def __init__(self, tokenizer: Any, template: str | None = None) -> None:
        self.tokenizer = tokenizer
        own = tokenizer.chat_template
        self._templates = {"default": template or PLAIN_TEMPLATE} if template or not own else _named(own)
        self.is_plain = template is None and not own

    @property
    def text(self) -> str:
        """The template itself."""
        return self._template(has_tools=True)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        settings: Mapping[str, Any] | None = None,
        is_continued: bool = False,
    ) -> list[int]:
        """Token ids of a conversation, up to where the model's answer begins.

        Text of users that spells a control token, such as `<|im_end|>`, is encoded as the text that it is.

        Args:
            messages: `role` and `content` each, and what else templates know; `tool_calls` with JSON arguments as text.
            tools: JSON schemas of functions, as the OpenAI interface has them.
            settings: variables of the template; names outside SETTINGS are left out.
            is_continued: whether the last message is the beginning of the answer, to be continued.

        Raises:
            ValueError: if the template refuses the conversation; with its reason.
        """
        _expect_unicode([messages, tools, settings])
        given = {name: value for name, value in (settings or {}).items() if name in SETTINGS}
        readable = [_readable(message, self.text) for message in messages]
        try:
            ids = self.tokenizer.apply_chat_template(
                readable,
                tools=[dict(tool) for tool in tools] or None,
                chat_template=self._template(has_tools=bool(tools)),
                add_generation_prompt=not is_continued,
                continue_final_message=is_continued,
                tokenize=True,
                return_dict=False,
                **self._neutralised(readable, tools),
                **given,
            )
        except Exception as error:  # a template raises whatever it likes, and jinja what it cannot do
            raise ValueError(f"the chat template refuses these messages: {_first_line(error)}") from error
        return [int(token_id) for token_id in ids]

    def _template(self, *, has_tools: bool) -> str:
        if has_tools and "tool_use" in self._templates:
            return self._templates["tool_use"]
        return self._templates.get("default") or next(iter(self._templates.values()))

    def _neutralised(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any]) -> dict[str, bool]:
        """The argument that makes control tokens in texts of users plain text; older versions refuse such texts."""
        if "sanitize_control_tokens" in signature(self.tokenizer.apply_chat_template).parameters:
            return {"sanitize_control_tokens": True}
        said = json.dumps([messages, list(tools)], ensure_ascii=False, default=str)
        if found := next((token for token in control_ids(self.tokenizer).values() if token in said), None):
            raise ValueError(f"a message contains the control token {found}; a newer transformers can neutralise it")
        return {}


def _expect_unicode(said: Any) -> None:
    """Refuse halves of characters, which JSON can spell and no text has."""
    try:
        json.dumps(said, ensure_ascii=False, default=str).encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError("a message holds half of a surrogate pair (\\ud800 to \\udfff), which is no text") from error


def read_template(file: Path) -> str:
    """The Jinja text of a template file.

    Raises:
        ValueError: if it cannot be read, is larger than LARGEST_TEMPLATE or is no template.
    """
    from jinja2 import TemplateSyntaxError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    try:
        data = file.read_bytes()
        text = data.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"chat template {file}: cannot be read ({error})") from error
    if len(data) > LARGEST_TEMPLATE:
        raise ValueError(f"chat template {file}: {len(data)} bytes; at most {LARGEST_TEMPLATE} are read")
    try:
        ImmutableSandboxedEnvironment(extensions=[loopcontrols]).parse(GENERATION_TAG.sub("", text))
    except TemplateSyntaxError as error:
        raise ValueError(f"chat template {file}: line {error.lineno}: {error.message}") from error
    return text


def _named(own: str | Mapping[str, str]) -> dict[str, str]:
    return {"default": own} if isinstance(own, str) else dict(own)


def _readable(message: Mapping[str, Any], template: str) -> dict[str, Any]:
    """A message as templates expect it: text as one string, arguments of calls as objects, no role developer."""
    shown = {name: value for name, value in message.items() if value is not None}
    content = shown.get("content", "")
    if isinstance(content, list):
        shown["content"] = "\n".join(part["text"] for part in content if part.get("type", "text") == "text")
    else:
        shown["content"] = content
    if shown.get("role") == "developer" and "developer" not in template:
        shown["role"] = "system"
    if calls := shown.get("tool_calls"):
        shown["tool_calls"] = [_readable_call(call) for call in calls]
    return shown


def _readable_call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = dict(call["function"])
    try:
        read = json.loads(function.get("arguments") or "{}")
        function["arguments"] = read if isinstance(read, dict) else function["arguments"]
    except ValueError:
        pass  # the model wrote no JSON then; it sees again what it wrote
    return {**call, "function": function}


def _first_line(error: Exception) -> str:
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)[:300]
