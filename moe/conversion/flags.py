"""Command-line flags made from the fields of dataclasses, so that a setting is written once.

A field is a flag if it was made by `flag`; its default, type and help are the flag's.
"""

import inspect
from collections.abc import Callable
from dataclasses import MISSING, field, fields
from functools import wraps
from typing import Annotated, Any, TypeVar, get_type_hints

import typer

T = TypeVar("T")


def flag(help: str, *, default: Any = MISSING, name: str | None = None, kind: Any = None, **bounds: Any) -> Any:  # noqa: A002 (Typer's word)
    """A dataclass field that is also a flag.

    Args:
        help: what `--help` says.
        default: of both; a flag without one must be given.
        name: of the flag, if not the field's.
        kind: type of the flag, if not the field's.
        bounds: `min` and `max`, as Typer takes them.
    """
    return field(default=default, metadata={"help": help, "name": name, "kind": kind, "bounds": bounds})


def with_flags(*groups: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the flags of dataclasses; it finds their values in its `**flags`, for `from_flags`."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command)
        own = [parameter for parameter in signature.parameters.values() if parameter.kind != parameter.VAR_KEYWORD]
        hints = get_type_hints(command, include_extras=True)
        own = [parameter.replace(annotation=hints[parameter.name]) for parameter in own]
        made = [parameter for group in groups for parameter in _parameters(group)]

        @wraps(command)
        def run(**values: Any) -> None:
            command(**values)

        parameters = [parameter.replace(kind=parameter.KEYWORD_ONLY) for parameter in (*own, *made)]
        run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


def from_flags(group: type[T], flags: dict[str, Any], **others: Any) -> T:
    """The dataclass from the values of its flags and its other fields."""
    values = {found.name: flags[found.name] for found in fields(group) if "help" in found.metadata}  # type: ignore[arg-type]
    return group(**values, **others)


def _parameters(group: type) -> list[inspect.Parameter]:
    hints = get_type_hints(group)
    made = []
    for found in fields(group):
        if "help" not in found.metadata:
            continue
        about = found.metadata
        name = f"--{(about['name'] or found.name).replace('_', '-')}"
        option = typer.Option(name, help=about["help"], **about["bounds"])
        default = inspect.Parameter.empty if found.default is MISSING else found.default
        kind = about["kind"] or hints[found.name]
        annotation = Annotated[kind, option]
        made.append(
            inspect.Parameter(found.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        )
    return made
