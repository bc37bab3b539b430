"""The file that names the members of a composition: YAML, checked before anything is loaded. Without torch."""

from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from routing.ground.expect import expect_name

from .choosing import Rules

MOST_BYTES = 1 << 20
"""Of the file, and of each file of examples: a router needs dozens of prompts, not millions."""
Text = Annotated[str, Field(min_length=1, max_length=1024)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class MemberRow(BaseModel):
    """One member.

    Args:
        name: by which requests and reports call it.
        model: a model folder, relative to the file, or a model id.
        labels: other names that requests may ask for.
        words: words in a prompt that speak for it.
        prompts: a text file, one example of a prompt per line.
        pack: a packed copy of its experts.
    """

    model_config = ConfigDict(extra="forbid")

    name: Name
    model: Text
    labels: list[Name] = Field(default=[], max_length=64)
    words: list[Text] = Field(default=[], max_length=4096)
    prompts: Text | None = None
    pack: Text | None = None


class MembersFile(BaseModel):
    """All members, and who answers if nothing speaks for anybody."""

    model_config = ConfigDict(extra="forbid")

    members: list[MemberRow] = Field(min_length=1, max_length=64)
    default: Name | None = None
    folder: Path = Field(default=Path(), exclude=True)

    def model_of(self, row: MemberRow) -> str:
        """Its folder if there is one beside the file, else a model id."""
        beside = self.folder / row.model
        return str(beside) if beside.exists() else row.model

    def rules(self) -> dict[str, Rules]:
        """How each member is found, with its examples read.

        Raises:
            ValueError: if a file of examples is missing, too large or no text.
        """
        return {
            row.name: Rules(labels=tuple(row.labels), words=tuple(row.words), prompts=self._prompts(row))
            for row in self.members
        }

    def _prompts(self, row: MemberRow) -> tuple[str, ...]:
        if row.prompts is None:
            return ()
        text = _read_bounded(self.folder / row.prompts)
        return tuple(line for line in text.splitlines() if line.strip())


def read_members(file: Path) -> MembersFile:
    """Read and check a file of members.

    Raises:
        ValueError: if it is missing, too large, no YAML, or says what it may not; the message names the place.
    """
    try:
        value = yaml.safe_load(_read_bounded(file))
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{file}: no YAML ({' '.join(str(error).split())[:200]})") from error
    if not isinstance(value, dict) or "folder" in value:
        raise ValueError(f"{file}: expected `members:`, a list of members, and `default:`; got {type(value).__name__}")
    try:
        found = MembersFile(**value, folder=file.resolve().parent)
    except (ValidationError, TypeError) as error:
        raise ValueError(f"{file}: {_first(error)}") from error
    names = [name for row in found.members for name in (row.name, *row.labels)]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{file}: {twice[0]!r} names two members; names and labels must differ")
    if found.default is not None:
        expect_name(found.default, [row.name for row in found.members], f"default member of {file}")
    return found


def _first(error: Any) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"


def _read_bounded(file: Path) -> str:
    if not file.is_file():
        raise ValueError(f"{file}: no such file")
    if file.stat().st_size > MOST_BYTES:
        raise ValueError(f"{file}: {file.stat().st_size} bytes; at most {MOST_BYTES} are read")
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: no UTF-8 text (byte {error.start})") from error
