"""Options of routers: plain values from a config.json, read into frozen dataclasses with names and defaults."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin

from ..ground.expect import expect_name


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options that belong together, as fields of a subclass, which checks ranges after `super()` has checked types.

    Raises:
        ValueError: if a value is not of its field's plain type: a number, a name, yes or no, one of some words.
    """

    def __post_init__(self) -> None:
        for field in fields(self):
            expect_plain(field.name, getattr(self, field.name), field.type)


Group = TypeVar("Group", bound=Options)


def read_options(groups: Sequence[type[Group]], values: Mapping[str, Any], what: str = "router option") -> list[Group]:
    """One value per group, each of the options that are its fields; what is not given keeps its default.

    Args:
        groups: no two with a field of the same name.
        values: by the names of all groups' fields, side by side.
        what: what the names are of, for the message.

    Raises:
        ValueError: if a name is no field of any group, or a value is not what its field takes.
    """
    known = [field.name for group in groups for field in fields(group)]
    for name in sorted(values):
        expect_name(name, known, what)
    return [group(**{f.name: values[f.name] for f in fields(group) if f.name in values}) for group in groups]


def expect_plain(name: str, value: object, annotation: object) -> None:
    """Raises ValueError if an option is not of its annotation's plain type; numbers are finite, and no bools."""
    kinds = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
    if value is None and NoneType in kinds:
        return
    if float in kinds:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value):
            raise ValueError(f"{name} must be a finite number; got {value!r}")
    for kind in kinds:
        plain = str if get_origin(kind) is Literal else kind
        if plain in (int, bool, str) and type(value) is not plain:
            raise ValueError(f"{name} must be {plain.__name__}; got {value!r}")
        if get_origin(kind) is Literal:
            expect_one_of(name, value, get_args(kind))


def expect_one_of(name: str, value: object, choices: Sequence[str]) -> None:
    """Raises ValueError if a setting is not among its choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")


def expect_at_least(name: str, value: float, least: float) -> None:
    """Raises ValueError if a setting is below its least value."""
    if value < least:
        raise ValueError(f"{name} must be at least {least}; got {value}")
