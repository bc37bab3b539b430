"""Files of settings: YAML in, one line of explanation out when something in them cannot be meant."""

import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from routing.ground.files import atomic_write

MAX_FILE_BYTES = 1 << 20
"""A description has some sixty lines; a larger file is something else."""
MOST_COMPLAINTS = 8
"""Faults that one message names: as many as a person mends at a time."""


class _Loader(yaml.SafeLoader):
    """YAML that reads `2e-3` as a number, which version 1.1 of the language takes for a word, and no key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise yaml.constructor.ConstructorError(None, None, f"{twice!r} is set twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    letter: [(tag, rule) for tag, rule in rules if tag != "tag:yaml.org,2002:float"]
    for letter, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"[-+]?(\d[\d_]*\.[\d_]*([eE][-+]?\d+)?|\.\d+([eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(inf|Inf|INF)|\.(nan|NaN))$"
    ),
    list("-+0123456789."),
)


def read_settings(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds.

    Raises:
        ValueError: if there is no such file, it is too large, not YAML, or no mapping with words as keys.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ValueError(f"{path}: larger than {MAX_FILE_BYTES} bytes, so it is no description of a run")
    try:
        found = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # a safe loader: it builds no objects
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise ValueError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from error
    found = {} if found is None else found
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise ValueError(f"{path}: expected lines such as `steps: 400`; got {type(found).__name__}")
    if not isinstance(found.get("model", {}), dict):
        raise ValueError(f"{path}: expected settings below `model:`, such as `num_experts: 64`; got {found['model']!r}")
    return found


def write_settings(path: Path, settings: Mapping[str, Any], heading: str) -> None:
    """Write a YAML file that `read_settings` reads back as it was, with a comment at its top."""
    with atomic_write(path) as file:
        file.write(f"# {heading}\n")
        yaml.safe_dump(dict(settings), file, sort_keys=False, allow_unicode=True)


def assigned(assignments: Sequence[str]) -> dict[str, Any]:
    """What `--set key=value` options say; a dot goes one level down, and values are read as in a file.

    Raises:
        ValueError: if one has no `=`, no key, or a value that is no YAML.
    """
    found: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals or not all(name.strip().split(".")):
            raise ValueError(f"--set {assignment}: expected key=value, such as model.num_experts=64")
        try:
            value = yaml.load(text, _Loader)
        except yaml.YAMLError as error:
            raise ValueError(f"--set {assignment}: the value is not readable as YAML") from error
        *outer, last = name.strip().split(".")
        place = found
        for key in outer:
            place = place.setdefault(key, {})
            if not isinstance(place, dict):
                raise ValueError(f"--set {assignment}: {key} was set to a value before, so nothing goes below it")
        place[last] = value
    return found


def merged(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Layers of settings, later ones first where both say something; mappings are merged key by key."""
    found: dict[str, Any] = {}
    for layer in layers:
        for name, value in layer.items():
            both = isinstance(value, Mapping) and isinstance(found.get(name), Mapping)
            found[name] = merged(found[name], value) if both else value
    return found


def expect_known(given: Iterable[str], known: Sequence[str], source: str) -> None:
    """Refuse settings that nobody knows.

    Args:
        given: names of settings.
        known: all names there are, with dots between levels.
        source: where they were given, for the message.

    Raises:
        ValueError: with the nearest known name of each.
    """
    faults = [f"unknown setting {name!r}{_nearest(name, known)}" for name in given if name not in known]
    if faults:
        raise ValueError(f"{source}: {'; '.join(faults[:MOST_COMPLAINTS])}; all settings: docs/training.md")


def _nearest(name: str, known: Sequence[str]) -> str:
    """A name that is meant: one that is spelled nearly so, on this level or on another."""
    last = {other.rsplit(".", 1)[-1]: other for other in reversed(known)}
    leaf = name.rsplit(".", 1)[-1]
    near = get_close_matches(name, known, n=1, cutoff=0.75) or [last[leaf]] * (leaf in last)
    near = near or [last[one] for one in get_close_matches(leaf, last, n=1, cutoff=0.6)]
    return f" (did you mean {near[0]!r}?)" if near else ""


def explained(error: ValidationError, source: str, prefix: str = "") -> ValueError:
    """The same error in one line: each setting, what was expected, and what was got."""
    lines = []
    for problem in error.errors(include_url=False, include_context=False)[:MOST_COMPLAINTS]:
        where = prefix + ".".join(str(part) for part in problem["loc"])
        lines.append(_complaint(where, problem))
    return ValueError(f"{source}: {'; '.join(lines)}")


def _complaint(where: str, problem: Any) -> str:
    got, what = problem["input"], problem["msg"]
    if problem["type"] == "value_error":  # a message of ours, which names the setting
        return what.removeprefix("Value error, ")
    if problem["type"] == "missing":
        return f"{where} is missing"
    said = f"; got {got!r}" if isinstance(got, str | int | float | list) or got is None else ""
    return f"{where}: {what.replace('Input should', 'it should')}{said}"
