"""Names of data as tables show them."""

from collections.abc import Iterable
from pathlib import Path


def short_names(names: Iterable[str]) -> dict[str, str]:
    """Each path by its file's name, with as many folders before it as tell it from the others."""
    parts = {name: Path(name).parts for name in names}
    found = {}
    for name, own in parts.items():
        depth = 1
        while depth < len(own) and any(own[-depth:] == p[-depth:] for other, p in parts.items() if other != name):
            depth += 1
        found[name] = "/".join(own[-depth:]) if own else name
    return found
