"""Calls of tools that a model wrote, as name and arguments, in the notations that model families use."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .channels import Part

XML_CALL = re.compile(r"<function=([^>\n]+)>(.*?)(?:</function>|\Z)", re.DOTALL)
XML_ARGUMENT = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)
NAMED_ARGUMENTS = re.compile(r"\s*([\w.-]+)(?:\[CALL_ID\][\w-]+)?\s*(?:\[ARGS\])?\s*(?=\{)")


@dataclass(frozen=True, kw_only=True)
class ToolCall:
    """One call.

    Args:
        name: of the tool that the model calls.
        arguments: a JSON object as text.
    """

    name: str
    arguments: str


def read_calls(part: Part, schemas: Mapping[str, Mapping[str, Any]]) -> list[ToolCall]:
    """The calls of a part of channel `call`; empty if its text is no call.

    Known are JSON objects with `name` and `arguments` or `parameters`, alone, in a list or one after the other
    (Hermes, Qwen, Mistral, Llama), a name before its JSON object (Mistral), tags `<function=NAME>` and
    `<parameter=KEY>` (Qwen3-Coder), and JSON addressed to a recipient (gpt-oss).

    Args:
        part: the text between the marks.
        schemas: JSON schema of each tool's arguments by its name, to read untyped values by.
    """
    if part.recipient:
        arguments = _json_values(part.text or "{}")
        return [_call(part.recipient, arguments[0])] if len(arguments) == 1 and isinstance(arguments[0], dict) else []
    if "<function=" in part.text:
        return [_xml_call(found, schemas) for found in XML_CALL.finditer(part.text)]
    if named := _named_calls(part.text):
        return named
    return list(_flat(_json_values(part.text)))


def _named_calls(text: str) -> list[ToolCall]:
    """Calls of the form `NAME{...}`, one after the other; empty if the text is anything else."""
    calls = []
    while text.strip():
        found = NAMED_ARGUMENTS.match(text)
        if found is None:
            return []
        try:
            arguments, end = json.JSONDecoder().raw_decode(text, found.end())
        except ValueError:
            return []
        calls.append(_call(found[1], arguments))
        text = text[end:].lstrip().removeprefix("[TOOL_CALLS]")
    return calls


def _flat(values: Iterable[Any]) -> Iterable[ToolCall]:
    for value in values:
        if isinstance(value, list):
            yield from _flat(value)
        elif isinstance(value, dict) and isinstance(value.get("name"), str):
            yield _call(value["name"], value.get("arguments", value.get("parameters", {})))


def _json_values(text: str) -> list[Any]:
    """The JSON values of a text, separated by spaces, commas or semicolons; empty if anything else is in it."""
    decoder, values, at = json.JSONDecoder(), [], 0
    while text[at:].strip(" \t\r\n,;"):
        at += len(text[at:]) - len(text[at:].lstrip(" \t\r\n,;"))
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            return []
        values.append(value)
    return values


def _xml_call(found: re.Match[str], schemas: Mapping[str, Mapping[str, Any]]) -> ToolCall:
    name = found[1].strip()
    types = schemas.get(name, {}).get("properties", {})
    arguments = {}
    for key, value in XML_ARGUMENT.findall(found[2]):
        schema = types.get(key, {}) if isinstance(types, Mapping) else {}
        arguments[key] = _typed(value, schema.get("type") if isinstance(schema, Mapping) else None)
    return _call(name, arguments)


def _typed(value: str, kind: Any) -> Any:
    """A value that stands as bare text, by the type of its schema: text stays, anything else is read as JSON."""
    if kind in ("string", None):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return {"true": True, "false": False, "none": None}.get(value.strip().lower(), value)


def _call(name: str, arguments: Any) -> ToolCall:
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return ToolCall(name=name, arguments=text or "{}")
