"""`pack` with a method: from a model to a packed copy of quantised experts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from routing.ground.expect import expect_folder, expect_name

from ..checkpoint.experts import ExpertLayer
from ..checkpoint.model_folder import skeleton_of
from ..checkpoint.tensors import TensorEntry
from ..codes.levels import LevelledScheme
from ..codes.schemes import FORMS, Scheme
from ..formats.catalogue import form_in_place
from ..formats.form import Form
from ..formats.lossy.low_bit import SchemeNames, stored_shape
from ..formats.lossy.ternary import TernaryForm
from ..formats.pack_index import PackIndex
from ..store.packing import expect_own
from .expert import FITS_ZEROS, METHODS, NEEDS_INPUTS
from .inputs import RecordedInputs
from .usage import Usage
from .writing import Work, is_transposed_in, write_low_bit

GROUP = 64
"""Columns that share a scale. With bfloat16 scales that adds a quarter of a bit to each weight."""
LEVELLED = {"planes": 3, "residual": 8}
"""Forms in levels, and how many levels are written by default."""
RANK_COLUMNS = 128
"""Columns for each rank of a residual block: its numbers of 16 bits then add 0.25 bits to a weight of a square."""


@dataclass(frozen=True, eq=False)
class Source:
    """A model that is to be quantised: nothing of it is in memory.

    Args:
        model: its skeleton.
        entries: the checkpoint's tensors.
        layers: where its experts lie.
        forms: how each layer is stored.
    """

    model: Any
    entries: dict[str, TensorEntry]
    layers: Sequence[ExpertLayer]
    forms: Sequence[Form]

    @classmethod
    def opened(cls, path_or_id: str | Path) -> "Source":
        """The model in a folder.

        Raises:
            ValueError: if it is damaged, has no experts, or all of them are quantised already.
        """
        model, entries, layers = skeleton_of(path_or_id)
        forms = [form_in_place(layer) for layer in layers]
        if all(form.name != "plain" for form in forms):
            stored = ", ".join(dict.fromkeys(form.name for form in forms))
            raise ValueError(
                f"{path_or_id}: its experts are stored as {stored} already; they are not quantised a second time, "
                "which would add another error. `expertier pack` without --method copies them as they are"
            )
        return cls(model, entries, layers, forms)

    def uniform(self, form: str, group: int, *, has_zero: bool = False) -> list[list[SchemeNames]]:
        """The same form for all experts that are not quantised yet.

        Args:
            form: one of FORMS.
            group: columns that share a scale, where the form leaves the choice; halved until it divides all matrices.
            has_zero: give integers zeros.

        Raises:
            ValueError: if the form does not divide their columns.
        """
        schemes = [Scheme.for_columns(form, columns, group, has_zero=has_zero) for columns in self._columns]
        # one for all matrices, because loaders of compressed-tensors take the scheme of all experts from one place
        least = min(schemes, key=lambda scheme: scheme.group)
        return [
            [(least.name,) * len(layer.parameters)] * layer.num_experts if stored.name == "plain" else []
            for layer, stored in zip(self.layers, self.forms, strict=True)
        ]

    def common_group(self, wanted: int) -> int:
        """A group that divides the columns of all matrices.

        Raises:
            ValueError: if none of 16 columns or more does.
        """
        found = min((Scheme.for_columns("int4", columns, wanted).group for columns in self._columns), default=0)
        if not found:
            raise ValueError(
                f"planes need groups of 16 columns or more, which {sorted(self._columns)} have not in common"
            )
        return found

    @property
    def num_weights(self) -> int:
        """Weights of all experts."""
        return sum(layer.num_experts * prod(parameter.shape) for layer in self.layers for parameter in layer.parameters)

    @property
    def ranks(self) -> int:
        """Ranks of a residual block: one for each RANK_COLUMNS of the narrowest matrix, at least one."""
        narrow = min(self._columns, default=1)
        return max(1, narrow // RANK_COLUMNS)

    @property
    def _columns(self) -> set[int]:
        """Inputs of all matrices that are not quantised yet."""
        return {
            stored_shape(parameter, is_transposed=is_transposed_in(self.model, layer))[1]
            for layer, stored in zip(self.layers, self.forms, strict=True)
            if stored.name == "plain"
            for parameter in layer.parameters
        }


def quantise(
    path_or_id: str | Path,
    target: Path,
    *,
    form: str,
    method: str = "hqq",
    group: int = GROUP,
    inputs: RecordedInputs | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, int]:
    """Write a packed copy of a model whose experts are quantised; goes on where a run that was killed stopped.

    Args:
        path_or_id: a model folder with safetensors weights, or a model id.
        target: the file to write; its index goes beside it.
        form: one of FORMS.
        method: one of METHODS.
        group: columns that share a scale, for integers.
        inputs: what the experts see; `gptq` and `awq` need it.
        progress: told after each expert how many are done, and how many there are.

    Returns:
        How many experts each method quantised: those that inputs hardly reach fall back to `rtn`.

    Raises:
        ValueError: if a name is unknown, inputs are missing, or the experts are quantised already.
    """
    expect_folder(target)
    expect_name(form, FORMS, "form")
    expect_method(form, method)
    if method in NEEDS_INPUTS and inputs is None:
        raise ValueError(f"{method} learns from inputs: give a text to calibrate on")
    source = Source.opened(path_or_id)
    expect_own(target, source.layers, source.entries)
    recipe: dict[str, Any] = {"form": form, "method": method, "group": group}
    if method in NEEDS_INPUTS and inputs is not None:
        recipe["calibration"] = inputs.about
    schemes_L = source.uniform(form, group, has_zero=method in FITS_ZEROS)
    work = Work(source.model, source.forms, schemes_L, method, inputs, recipe)
    return write_low_bit(target, work, PackIndex.of(source.entries), progress)


def expect_method(form: str, method: str) -> None:
    """Refuse a method that does not exist, or fits what a form does not have.

    Raises:
        ValueError: if so.
    """
    expect_name(method, METHODS, "method")
    if method == "hqq" and not form.startswith("int"):
        raise ValueError(f"hqq fits the zeros of integers; {form} has none, use --method rtn, gptq or awq")


def quantise_in_levels(
    path_or_id: str | Path,
    target: Path,
    *,
    form: str,
    group: int = 2 * GROUP,
    levels: int | None = None,
    usage: Usage | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, int]:
    """Write a packed copy whose experts can be read in part; goes on where a run that was killed stopped.

    Args:
        path_or_id: a model folder with safetensors weights, or a model id.
        target: the file to write; its index goes beside it.
        form: `planes` or `residual`.
        group: columns that share a scale of planes, halved until it divides all matrices.
        levels: to write; of planes the first has two bits and each further one more, 3 by default; of residual blocks
            the default is 8.
        usage: how much each expert counts, which orders levels by what they gain.
        progress: told after each expert how many are done, and how many there are.

    Returns:
        How many experts are in levels, and how many were quantised already and are copied.

    Raises:
        ValueError: if the form is unknown, the experts are quantised already, or no group divides the columns.
    """
    expect_folder(target)
    expect_name(form, LEVELLED, "form")
    source = Source.opened(path_or_id)
    expect_own(target, source.layers, source.entries)
    size = source.common_group(group) if form == "planes" else source.ranks
    scheme = LevelledScheme(form, size, levels or LEVELLED[form])
    recipe: dict[str, Any] = {"form": form, "levels": scheme.name}
    nothing: list[list[SchemeNames]] = [[] for _ in source.layers]
    work = Work(source.model, source.forms, nothing, "rtn", None, recipe, levels=scheme, usage=usage)
    return write_low_bit(target, work, PackIndex.of(source.entries), progress)


def quantise_to_ternary(
    path_or_id: str | Path,
    target: Path,
    *,
    inputs: RecordedInputs | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, int]:
    """Write a packed copy of ternary experts in words of variable length; goes on where a run that was killed stopped.

    Args:
        path_or_id: a model folder with safetensors weights, or a model id.
        target: the file to write; its index goes beside it.
        inputs: what the experts see, so that errors are spread by GPTQ; without, each weight is rounded alone.
        progress: told after each expert how many are done, and how many there are.

    Returns:
        How many experts each method quantised: those that inputs hardly reach fall back to `rtn`.

    Raises:
        ValueError: if the experts are quantised already.
    """
    expect_folder(target)
    source = Source.opened(path_or_id)
    expect_own(target, source.layers, source.entries)
    recipe: dict[str, Any] = {"form": TernaryForm.name, "method": "rtn" if inputs is None else "gptq"}
    if inputs is not None:
        recipe["calibration"] = inputs.about
    nothing: list[list[SchemeNames]] = [[] for _ in source.layers]
    work = Work(source.model, source.forms, nothing, recipe["method"], inputs, recipe, is_ternary=True)
    return write_low_bit(target, work, PackIndex.of(source.entries), progress)
