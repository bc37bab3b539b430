"""What is checked before any work is done: output files and folders, and names that must be known."""

import os
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from itertools import combinations
from pathlib import Path


def expect_folder(*files: Path | None) -> None:
    """Refuse output files that cannot be written: no folder for them, or something there that is no file.

    Args:
        files: files that will be written; None stands for an output that was not asked for.

    Raises:
        ValueError: if a folder is missing or read-only, or if the name belongs to a folder or a device.
    """
    for file in files:
        if file is None:
            continue
        folder = file.absolute().parent
        if not folder.is_dir():
            raise ValueError(f"cannot write {file}: the folder {folder} does not exist; create it first")
        if file.is_dir():
            raise ValueError(f"cannot write {file}: it is a folder; give the name of a file")
        if file.exists() and not file.is_file():
            raise ValueError(f"cannot write {file}: it is a device or a pipe; give the name of a file")
        if not os.access(folder, os.W_OK):
            raise ValueError(f"cannot write {file}: the folder {folder} is read-only")


def expect_outputs(*files: Path | None, inputs: Iterable[str | Path | None] = ()) -> None:
    """Refuse output files that cannot be written, that are each other, or that the same command reads.

    Args:
        files: files that will be written; None stands for an output that was not asked for.
        inputs: files and folders that the command reads. All files below a folder count. None and names of nothing
            that is there (model ids) are passed over.

    Raises:
        ValueError: before anything is read or written.
    """
    expect_folder(*files)
    given = [file for file in files if file is not None]
    for one, other in combinations(given, 2):
        if one.resolve() == other.resolve() or _is_same(one, other):
            raise ValueError(f"two outputs have the name {other}; give each a file of its own")
    sources = [Path(source) for source in inputs if source is not None]
    for file in given:
        expect_not_an_input(file, *sources)


def expect_not_an_input(out: Path, *inputs: Path) -> None:
    """Refuse an output, a file or a folder, that is something the same command reads, under whatever name.

    Args:
        out: what will be written.
        inputs: files and folders that are read; all files below a folder count.

    Raises:
        ValueError: if writing would overwrite an input; the message names both.
    """
    if not out.exists():
        return
    for source in inputs:
        if _is_same(out, source):
            raise ValueError(f"cannot write {out}: this command reads it; choose another name for the output")
        if out.is_file() and source.is_dir() and any(_is_same(out, file) for file in _files_below(source)):
            raise ValueError(
                f"cannot write {out}: it is a file of {source}, which this command reads; "
                "choose another name for the output"
            )


def _is_same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return False


def _files_below(folder: Path) -> Iterator[Path]:
    for place, _, names in os.walk(folder):
        yield from (Path(place, name) for name in names)


def expect_there(*sources: str | Path | None) -> None:
    """Refuse inputs that do not exist, before anything long begins.

    Args:
        sources: files or folders that will be read; None stands for an input that was not given.

    Raises:
        ValueError: if one is missing; the message names it.
    """
    for source in sources:
        if source is not None and not Path(source).exists():
            raise ValueError(f"{source}: no such file or folder")


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
