"""A stored form that reads changed experts from their records and all others from the checkpoint."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from ...checkpoint.experts import Parameter
from ...formats.form import Extent, Form, PartReader
from ...formats.plain import PlainForm
from .records import ExpertRecords


@dataclass(frozen=True, eq=False)
class OverlaidForm(PlainForm):
    """The experts of one layer of a model that is being changed.

    A record begins with the matrices as the model computes with them, in the order of `parameters`.

    Args:
        number: of the MoE layer.
        records: of the experts that have changed.
    """

    number: int
    records: ExpertRecords

    @property
    def files(self) -> set[Path]:
        return super().files | self.records.paths(self.number)

    def extents(self, expert: int) -> list[Extent]:
        """Those of the record where there is one: one for each region, whose parameters follow each other."""
        entry = self.records.entry(self.number, expert)
        if entry is None:
            return super().extents(expert)
        starts = accumulate((region.nbytes for region in self.regions), initial=0)
        return [
            Extent(entry, entry.offset + start, region.nbytes, number, region.start)
            for number, (start, region) in enumerate(zip(starts, self.regions, strict=False))
        ]

    @cached_property
    def is_shiftable(self) -> bool:
        # of the checkpoint's extents; those of records are one for each region, too
        return self.is_straight and all(
            len(super(OverlaidForm, self).extents(expert)) == len(self.regions)
            for expert in range(self.layer.num_experts)
        )

    def convert(self, expert: int, slot: torch.Tensor, model: Any, read: PartReader) -> None:
        """Fill a slot from the record, or by transformers' own conversion where there is none."""
        entry = self.records.entry(self.number, expert)
        if entry is None:
            super().convert(expert, slot, model, read)
            return
        raw = read(entry, entry.offset, self.expert_bytes, (self.expert_bytes,))
        for to, matrix in zip(
            self.ordered(self.views(slot, (0,) * len(self.regions))), self.matrices(raw), strict=True
        ):
            to.copy_(matrix)

    def matrices(self, data: torch.Tensor) -> list[torch.Tensor]:
        """`matrices_in` a record of this layer."""
        return matrices_in(data, self.parameters)

    def ordered(self, weights: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """An expert's matrices in the order in which a record has them."""
        return [weights[parameter.name] for parameter in self.parameters]


def matrices_in(data: torch.Tensor, parameters: Sequence[Parameter]) -> list[torch.Tensor]:
    """The matrices at the beginning of a record's bytes, where they lie and in their order."""
    sizes = [parameter.nbytes for parameter in parameters]
    pairs = zip(data[: sum(sizes)].split(sizes), parameters, strict=True)
    return [part.view(parameter.dtype).view(parameter.shape) for part, parameter in pairs]


def expect_plain(forms: Sequence[Form], method: str) -> list[PlainForm]:
    """The forms of a model whose experts can be changed.

    Raises:
        ValueError: if experts are stored in fewer bits than the model computes with.
    """
    for form in forms:
        if not isinstance(form, PlainForm):
            raise ValueError(
                f"method {method} changes experts, and those of this model are stored as {form.name}; use --method "
                "lora, or write a plain copy with `expertier dequantise`"
            )
    return [form for form in forms if isinstance(form, PlainForm)]
