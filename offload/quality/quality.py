"""A model judged against a reference, on a text, within a memory budget: both run offloaded, one after the other."""

import gc
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ..checkpoint.location import local_folder
from ..formats.form import Form
from ..lowbit.inputs import RecordedInputs, record_inputs
from ..lowbit.reading import ExpertReader
from ..runtime.depths import with_depth
from ..runtime.loading import load
from ..runtime.opening import OpenedCheckpoint, open_headers
from ..runtime.options import LoadOptions
from ..serve.corpus import sequences
from ..serve.text import open_text
from .expert_errors import LayerErrors, expert_errors
from .predictions import Predictions, compare_predictions, spool_logits

Told = Callable[[str, float], None]


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """A model and how it is loaded.

    Args:
        path_or_id: folder or id of the model, in any form that `load` opens.
        pack: a packed copy of its experts.
        depth: levels of it that are read, see `load`.
        cpu_memory: budget of the process.
        cache_experts: RAM slots per layer instead.
    """

    path_or_id: str | Path
    pack: Path | None = None
    depth: int | str = "all"
    cpu_memory: str | int = "auto"
    cache_experts: int | None = None

    def opened(self, context: int) -> OpenedCheckpoint:
        """What it consists of, without a weight."""
        options = LoadOptions(
            path_or_id=self.path_or_id, pack=self.pack, depth=self.depth, cpu_memory=self.cpu_memory, context=context
        )
        return with_depth(open_headers(self.path_or_id, self.pack), options)

    def loaded(self, context: int) -> Any:
        """The model."""
        return load(
            self.path_or_id,
            pack=self.pack,
            depth=self.depth,
            cpu_memory=self.cpu_memory,
            cache_experts=self.cache_experts,
            context=context,
            device="cpu",
        )


@dataclass(frozen=True, kw_only=True)
class Quality:
    """What came of a comparison.

    Args:
        predictions: token by token.
        layers: errors of each layer's experts; None if the models have other experts.
        expert_bytes: of the reference and of the model, as they are stored.
        expert_bits: stored bits of an expert's weight, of the reference and of the model.
    """

    predictions: Predictions
    layers: list[LayerErrors] | None
    expert_bytes: tuple[int, int]
    expert_bits: tuple[float, float]

    def as_json(self) -> dict[str, Any]:
        return {
            **asdict(self.predictions),
            "layers": None if self.layers is None else [asdict(layer) for layer in self.layers],
            "reference_expert_bytes": self.expert_bytes[0],
            "expert_bytes": self.expert_bytes[1],
            "reference_bits_per_weight": self.expert_bits[0],
            "bits_per_weight": self.expert_bits[1],
        }


def quality(
    model: Contestant,
    reference: Contestant,
    data: Path,
    *,
    tokens: int = 4096,
    length: int = 256,
    scratch: Path | None = None,
    progress: Told = lambda what, share: None,
) -> Quality:
    """Judge one model against a reference; `Judge` judges several against the same.

    Args:
        model: the one that is judged.
        reference: the one that is right.
        data: a text file, or a folder of them.
        tokens: to read at most.
        length: tokens of a sequence.
        scratch: see `Judge`.
        progress: told what is going on, and the share of it that is done.

    Raises:
        ValueError: if the data holds no text, a model cannot be loaded, or the vocabularies differ.
    """
    with TemporaryDirectory(dir=scratch) as place:
        judge = Judge(reference, data, Path(place), tokens=tokens, length=length, progress=progress)
        return judge.judge(model, progress)


class Judge:
    """A reference that has read a text, and judges models by it.

    Args:
        reference: the model that is right.
        data: a text file, or a folder of them.
        scratch: an empty folder for the reference's logits and its experts' inputs; the caller removes it.
        tokens: to read at most.
        length: tokens of a sequence.
        progress: told what is going on, and the share of it that is done.

    Raises:
        ValueError: if the data holds no text, or the reference cannot be loaded.
    """

    def __init__(
        self,
        reference: Contestant,
        data: Path,
        scratch: Path,
        *,
        tokens: int = 4096,
        length: int = 256,
        progress: Told = lambda what, share: None,
    ) -> None:
        folder = local_folder(reference.path_or_id)
        self._texts = [ids for ids in sequences(data, open_text(folder), length, tokens) if len(ids) > 1]
        if not self._texts:
            raise ValueError(f"data {data}: holds less than two tokens of text")
        self._length, self._logits = length, scratch / "logits"
        self._inputs, self._dtype = _read_by_reference(reference, self._texts, scratch, length, progress)
        self._reference = reference.opened(length)

    def judge(self, model: Contestant, progress: Told = lambda what, share: None) -> Quality:
        """Compare a model with the reference.

        Raises:
            ValueError: if it cannot be loaded, or has another vocabulary.
        """
        predictions = _read_by_model(model, self._texts, self._logits, self._dtype, self._length, progress)
        openings = [self._reference, model.opened(self._length)]
        sizes = [_bytes_of(opened.forms) for opened in openings]
        weights = [_weights_of(opened.forms) for opened in openings]
        bits = [8 * size / max(count, 1) for size, count in zip(sizes, weights, strict=True)]
        return Quality(
            predictions=predictions,
            layers=_errors(openings, self._inputs, progress),
            expert_bytes=(sizes[0], sizes[1]),
            expert_bits=(bits[0], bits[1]),
        )


def _read_by_reference(
    reference: Contestant, texts: Sequence[list[int]], place: Path, length: int, progress: Told
) -> tuple[RecordedInputs, torch.dtype]:
    """Leave the reference's logits and its experts' inputs in a folder."""
    loaded = reference.loaded(length)
    (place / "logits").mkdir()
    total, done = 2 * sum(map(len, texts)), 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress("the reference reads", done / total)

    try:
        spool_logits(loaded, texts, place / "logits", advance)
        inputs = record_inputs(loaded, texts, place / "inputs", {}, advance)
        dtype = loaded.dtype
    finally:
        loaded.offload.close()
    del loaded
    gc.collect()
    return inputs, dtype


def _read_by_model(
    model: Contestant, texts: Sequence[list[int]], logits: Path, dtype: torch.dtype, length: int, progress: Told
) -> Predictions:
    loaded = model.loaded(length)
    total, done = sum(map(len, texts)), 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress("the model reads", done / total)

    try:
        return compare_predictions(loaded, texts, logits, dtype, advance)
    finally:
        loaded.offload.close()
        del loaded
        gc.collect()


def _errors(openings: Sequence[OpenedCheckpoint], inputs: RecordedInputs, progress: Told) -> list[LayerErrors] | None:
    reference, model = openings
    if [_shapes(form) for form in reference.forms] != [_shapes(form) for form in model.forms]:
        return None
    readers = [ExpertReader(opened.model, opened.forms) for opened in openings]
    try:
        return expert_errors(
            *readers,
            reference.forms,
            inputs,
            lambda layer: progress("experts are compared", (layer + 1) / len(reference.forms)),
        )
    finally:
        for reader in readers:
            reader.close()


def _shapes(form: Form) -> tuple[int, tuple[tuple[str, tuple[int, ...]], ...]]:
    return form.layer.num_experts, tuple((parameter.name, parameter.shape) for parameter in form.layer.parameters)


def _bytes_of(forms: Sequence[Form]) -> int:
    return sum(form.stored_bytes(expert) for form in forms for expert in range(form.layer.num_experts))


def _weights_of(forms: Sequence[Form]) -> int:
    return sum(
        form.layer.num_experts * parameter.nbytes // parameter.dtype.itemsize
        for form in forms
        for parameter in form.layer.parameters
    )
