"""The index of a packed copy of experts: which layers it holds, in which encoding, and where each record is."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from routing.ground.expect import expect_name
from routing.ground.files import write_json

from ..checkpoint.experts import ExpertLayer
from ..checkpoint.tensors import TensorEntry
from ..codes.levels import NAME as LEVELS
from ..codes.levels import LevelledScheme
from ..codes.schemes import NAME
from .catalogue import FORMS
from .form import BLOCK_BYTES, Form
from .lossy.levelled import LevelledForm
from .lossy.low_bit import LowBitForm
from .lossy.ternary import TernaryForm

# 100 bytes for each of two million experts; the largest models have some ten thousand
MAX_INDEX_BYTES = 256 << 20
Count = Field(ge=0, lt=1 << 62)
Checksum = Annotated[str, Field(pattern="^[0-9a-f]{16}$")]
SchemeName = Annotated[str, Field(pattern=f"^(?:{NAME.pattern})$")]
FormName = Annotated[str, AfterValidator(lambda name: expect_name(name, FORMS, "stored form"))]


class PackedRecord(BaseModel):
    """One expert: where it is, how long it is, and the XXH3 (64 bits, hexadecimal) of its bytes.

    An expert in levels has the XXH3 up to the end of each, and the squared error that is left after each.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    offset: int = Count
    nbytes: int = Count
    xxh3: Checksum
    level_xxh3: tuple[Checksum, ...] | None = None
    level_errors: tuple[float, ...] | None = None


class PackedParameter(BaseModel):
    """A parameter of an experts module, as the model has it."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    dtype: str
    shape: tuple[int, ...]


class PackedLayer(BaseModel):
    """One layer's experts; `encoding` is the name of their form.

    Quantised experts of ours have `schemes` too: of each expert, a name for each parameter; or `levels`, one name.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    module: str
    parameters: tuple[PackedParameter, ...]
    encoding: FormName
    records: tuple[PackedRecord, ...]
    schemes: tuple[tuple[SchemeName, ...], ...] | None = None
    levels: Annotated[str, Field(pattern=f"^(?:{LEVELS.pattern})$")] | None = None
    is_transposed: bool = False

    def opened(self, file: Path, layer: ExpertLayer, end: int) -> Form:
        """The form of these experts in `file`, whose records end at byte `end`.

        Raises:
            ValueError: if a record lies outside the file, or has a size that the form cannot have.
        """
        form = FORMS[self.encoding]
        try:
            least, most = form.record_bounds(layer)
        except ValueError as error:
            raise ValueError(f"{file}: {error}; make it again with `expertier pack`") from error
        for record in self.records:
            is_inside = record.offset % BLOCK_BYTES == 0 and record.offset + record.nbytes <= end
            if not (is_inside and least <= record.nbytes <= most):
                raise ValueError(
                    f"{file}: an expert of {self.module} would have {record.nbytes} bytes at {record.offset}; "
                    "the index is damaged, make it again with `expertier pack`"
                )
        entries = (
            TensorEntry(f"{self.module}[{expert}]", file, record.offset, record.nbytes, "U8", (record.nbytes,))
            for expert, record in enumerate(self.records)
        )
        opened = form.of_records(layer, tuple(entries))
        try:
            return self._described(opened)
        except ValueError as error:
            raise ValueError(f"{file}: {self.module}: {error}; make it again with `expertier pack`") from error

    def _described(self, opened: Form) -> Form:
        if isinstance(opened, LevelledForm):
            scheme = LevelledScheme.named(self.levels or "")
            counts = {len(each or ()) for record in self.records for each in (record.level_xxh3, record.level_errors)}
            if counts != {scheme.levels}:
                raise ValueError(f"some experts have no checksum and error for each of {scheme.levels} levels")
            return opened.described(scheme, is_transposed=self.is_transposed)
        if isinstance(opened, TernaryForm):
            return opened.described(is_transposed=self.is_transposed)
        if not isinstance(opened, LowBitForm):
            return opened
        names, wanted = self.schemes or (), len(opened.layer.parameters)
        if len(names) != len(self.records) or any(len(several) != wanted for several in names):
            raise ValueError("some experts have no scheme for each matrix")
        return opened.described(names, is_transposed=self.is_transposed)

    def holds(self, layer: ExpertLayer) -> bool:
        """Whether these are that layer's experts."""
        return (self.module, self.parameters, len(self.records)) == (
            layer.module_name,
            describe_parameters(layer),
            layer.num_experts,
        )


class PackIndex(BaseModel):
    """What is in a packed copy. `source` tells one checkpoint from another: size and time of change of its files."""

    model_config = ConfigDict(extra="forbid")
    format: Literal["expertier-pack"] = "expertier-pack"
    version: Literal[2] = 2
    source: dict[str, tuple[int, int]]
    is_compressed: bool
    form: FormName | None = None
    """What was asked for, if neither plain nor compressed; a layer that it does not suit is plain all the same."""
    recipe: dict[str, Any] | None = None
    """How experts were quantised, and what came of it, for people; None if they were not."""
    layers: list[PackedLayer] = []

    @classmethod
    def of(cls, entries: Mapping[str, TensorEntry], form: str = "plain") -> "PackIndex":
        """The index of a checkpoint of which nothing is packed yet."""
        files = sorted({file for entry in entries.values() for file in entry.files})
        stats = [file.stat() for file in files]
        source = {name: (stat.st_size, stat.st_mtime_ns) for name, stat in zip(_names_apart(files), stats, strict=True)}
        is_named = form not in ("plain", "compressed")
        return cls(source=source, is_compressed=form == "compressed", form=form if is_named else None)

    @classmethod
    def read(cls, file: Path) -> "PackIndex":
        """Raises ValueError if `file` is something else."""
        if file.stat().st_size > MAX_INDEX_BYTES:
            raise ValueError(f"{file}: too large for the index of a packed copy")
        try:
            return cls.model_validate(json.loads(file.read_text(encoding="utf-8")))
        except (ValidationError, ValueError) as error:
            found = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
            place = ".".join(map(str, found["loc"]))
            raise ValueError(
                f"{file}: not the index of a packed copy of version 2 ({place} {found['msg']}); make it again"
            ) from error

    def write(self, file: Path) -> None:
        """Atomically, as JSON."""
        write_json(file, self.model_dump(mode="json", exclude_none=True))

    def begins_like(self, other: "PackIndex", layers: Sequence[ExpertLayer]) -> bool:
        """Whether this is a part of what `other`, of the same model, is going to be."""
        return (
            (self.source, self.is_compressed, self.form) == (other.source, other.is_compressed, other.form)
            and len(self.layers) <= len(layers)
            and all(packed.holds(layer) for packed, layer in zip(self.layers, layers, strict=False))
        )

    @property
    def end(self) -> int:
        """Bytes of the file that holds these records."""
        last = [layer.records[-1] for layer in self.layers if layer.records]
        return rounded_up(last[-1].offset + last[-1].nbytes) if last else 0


def _names_apart(files: Sequence[Path]) -> list[str]:
    """What the files are called: by their names alone where these differ, which is how older indexes call them."""
    names = [file.name for file in files]
    if len(set(names)) == len(names):
        return names
    folder = os.path.commonpath(files)
    return [file.relative_to(folder).as_posix() for file in files]


def describe_parameters(layer: ExpertLayer) -> tuple[PackedParameter, ...]:
    """A layer's parameters as an index names them."""
    return tuple(
        PackedParameter(
            name=parameter.name, dtype=str(parameter.dtype).removeprefix("torch."), shape=tuple(parameter.shape)
        )
        for parameter in layer.parameters
    )


def rounded_up(nbytes: int) -> int:
    """Whole blocks."""
    return -(-nbytes // BLOCK_BYTES) * BLOCK_BYTES
