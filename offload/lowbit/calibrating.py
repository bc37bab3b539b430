"""Runs the model that is to be quantised over a text: its experts' inputs, and how sensitive each layer is."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..checkpoint.location import local_folder
from ..runtime.loading import load
from ..serve.corpus import sequences, text_files
from ..serve.text import open_text
from .inputs import DONE_NAME, RecordedInputs, record_inputs
from .sensitivity import sensitivities

PROBED_TOKENS = 512
"""Of the text, read once for each layer to find sensitivities."""
SENSITIVITY = "sensitivity"


def calibrate(
    path_or_id: str | Path,
    data: Path,
    folder: Path,
    *,
    tokens: int,
    length: int,
    cpu_memory: str | int = "auto",
    needs_sensitivity: bool = False,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> RecordedInputs:
    """Record what experts see, or open the recording that an interrupted run of the same text left.

    Args:
        path_or_id: folder or id of the model, not quantised.
        data: a text file, or a folder of them.
        folder: scratch; takes the tokens times the model's width and layers, in bfloat16.
        tokens: to read at most.
        length: tokens of a sequence.
        cpu_memory: budget of the process.
        needs_sensitivity: also find what errors in each layer cost; `about["sensitivity"]` has them.
        progress: told what is going on, how much of it is done, and how much there is.

    Raises:
        ValueError: if the data holds no text, or the model cannot be loaded in the budget.
    """
    place = local_folder(path_or_id)
    stats = [file.stat() for file in text_files(data)]
    texts = [[stat.st_size, stat.st_mtime_ns] for stat in stats]
    about: dict[str, Any] = {"model": str(place), "data": texts, "asked": tokens, "length": length}
    if (folder / DONE_NAME).is_file():
        found = RecordedInputs(folder)
        is_same = {key: found.about.get(key) for key in about} == about
        if is_same and (SENSITIVITY in found.about or not needs_sensitivity):
            return found
    model = load(place, cpu_memory=cpu_memory, context=length, device="cpu")
    try:
        read = [ids for ids in sequences(data, open_text(place), length, tokens) if len(ids) > 1]
        if not read:
            raise ValueError(f"data {data}: holds less than two tokens of text")
        if needs_sensitivity:
            probed = read[: max(1, PROBED_TOKENS // length)]
            about[SENSITIVITY] = sensitivities(model, probed, lambda layer: progress("trying layers", layer + 1, 0))
        total, done = sum(map(len, read)), 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            progress("reading the text", done, total)

        return record_inputs(model, read, folder, about, advance)
    finally:
        model.offload.close()
        del model
        gc.collect()
