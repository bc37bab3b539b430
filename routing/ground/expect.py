"""What is checked before any work is done: output files and folders, and names that must be known."""

from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path


def expect_folder(*files: Path | None) -> None:
    """Refuse output files whose folder does not exist.

    Args:
        files: files that will be written; None stands for an output that was not asked for.

    Raises:
        ValueError: if a folder is missing; the message says which.
    """
    for file in files:
        if file is not None and not file.absolute().parent.is_dir():
            raise ValueError(
                f"cannot write {file}: the folder {file.absolute().parent} does not exist; create it first"
            )


def expect_new(out: Path) -> None:
    """Refuse an output folder that exists already, or whose own folder does not.

    Raises:
        ValueError: in both cases.
    """
    if out.exists():
        raise ValueError(f"{out} exists already; choose another --out")
    expect_folder(out)


def expect_name(name: str, known: Iterable[str], what: str) -> str:
    """The name, if it is known.

    Args:
        name: as the user wrote it.
        known: all names there are.
        what: what the names are of, for the message: `"cache policy"`.

    Raises:
        ValueError: if it is not known; the message suggests the nearest name and lists all.
    """
    names = sorted(known)
    if name in names:
        return name
    near = get_close_matches(str(name), names, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise ValueError(f"unknown {what} {name!r}{hint}; there are {', '.join(names) or 'none'}")


def expect_choice(value: str, choices: Iterable[str], name: str) -> str:
    """The value of an option, if it is one of its choices.

    Args:
        value: as the user wrote it.
        choices: all there are, in the order in which the message lists them.
        name: the option's.

    Raises:
        ValueError: if it is none of them.
    """
    listed = list(choices)
    if value in listed:
        return value
    near = get_close_matches(str(value), listed, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{name} must be one of {', '.join(listed)}; got {value!r}{hint}")
