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
from ..runtime.loading import load
from ..runtime.opening import OpenedCheckpoint, open_headers
from ..serve.corpus import sequences
from ..serve.text import open_text
from .expert_errors import LayerErrors, expert_errors
from .predictions import Predictions, compare_predictions, spool_logits

Told = Callable[[str, float], None]


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """A model and how it is loaded.

    Args:
        path_or_id: of the model.
        pack: a packed copy of its experts.
        cpu_memory: budget of the process.
        cache_experts: RAM slots per layer instead.
    """

    path_or_id: str | Path
    pack: Path | None = None
    cpu_memory: str | int = "auto"
    cache_experts: int | None = None

    def loaded(self, context: int) -> Any:
        """The model."""
        return load(
            self.path_or_id,
            pack=self.pack,
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
    """Judge a model against a reference.

    Args:
        model: the one that is judged.
        reference: the one that is right.
        data: a text file, or a folder of them.
        tokens: to read at most.
        length: tokens of a sequence.
        scratch: a folder for the reference's logits and its experts' inputs, which are removed at the end; None takes
            the system's folder for temporary files.
        progress: told what is going on, and the share of it that is done.

    Raises:
        ValueError: if the data holds no text, a model cannot be loaded, or the vocabularies differ.
    """
    folder = local_folder(reference.path_or_id)
    texts = [ids for ids in sequences(data, open_text(folder), length, tokens) if len(ids) > 1]
    if not texts:
        raise ValueError(f"data {data}: holds less than two tokens of text")
    with TemporaryDirectory(dir=scratch) as place:
        inputs, dtype = _read_by_reference(reference, texts, Path(place), length, progress)
        predictions = _read_by_model(model, texts, Path(place) / "logits", dtype, length, progress)
        openings = [open_headers(each.path_or_id, each.pack) for each in (reference, model)]
        layers = _errors(openings, inputs, progress)
    sizes = [_bytes_of(opened.forms) for opened in openings]
    weights = [_weights_of(opened.forms) for opened in openings]
    bits = [8 * size / max(count, 1) for size, count in zip(sizes, weights, strict=True)]
    return Quality(
        predictions=predictions, layers=layers, expert_bytes=(sizes[0], sizes[1]), expert_bits=(bits[0], bits[1])
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


def _errors(
    openings: Sequence[OpenedCheckpoint], inputs: RecordedInputs, progress: Told
) -> list[LayerErrors] | None:
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
