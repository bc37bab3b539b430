"""Checkpoints of a training run: the model as a Hugging Face folder, the rest beside it; whole or not there at all."""

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from moe import MoEForCausalLM
from routing.ground.files import write_json

from .corpus import Corpus
from .description.config import TrainConfig
from .run_folder import CONFIG_FILE, STATE_FILES, UNFINISHED, checkpoints

STATE_FILE = STATE_FILES["torch"]
KEPT = 2
"""Checkpoints that stay: a damaged last one leaves one to go back to."""


@dataclass(frozen=True, eq=False)
class CheckpointPlace:
    """Where a run's checkpoints go, and what stands in each besides the model.

    Args:
        run: folder of the run.
        config: with the precision resolved, so that a resumed run computes the same.
        corpus: its tokenizer goes along.
    """

    run: Path
    config: TrainConfig
    corpus: Corpus


def save_checkpoint(place: CheckpointPlace, step: int, model: MoEForCausalLM, optimizer: Optimizer) -> Path:
    """Write `<run>/checkpoints/step_<n>`; older ones but the last are removed afterwards.

    Args:
        place: folder of the run, which holds one folder per checkpoint.
        step: optimiser steps done.
        model, optimizer: their whole state is kept, and that of torch's random generators.
    """

    def write(folder: Path) -> None:
        model.save_pretrained(folder)
        torch.save({"step": step, "optimizer": optimizer.state_dict(), "random": _random_state()}, folder / STATE_FILE)

    return write_checkpoint(place, step, write)


def write_checkpoint(place: CheckpointPlace, step: int, write: Callable[[Path], None]) -> Path:
    """Write `<run>/checkpoints/step_<n>`, whose model `write` makes; older ones but the last are removed afterwards."""
    run = place.run
    folder = run / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"step_{step:08d}"
    if target.exists():
        return target
    with tempfile.TemporaryDirectory(dir=folder, prefix=UNFINISHED) as staging:
        finished = Path(staging) / "checkpoint"
        write(finished)
        place.corpus.save_tokenizer(finished)
        write_json(finished / CONFIG_FILE, asdict(place.config))
        _sync(finished)
        finished.rename(target)
    for old in checkpoints(run)[:-KEPT]:
        shutil.rmtree(old)
    return target


def restore(folder: Path, model: MoEForCausalLM, optimizer: Optimizer) -> int:
    """Put a checkpoint's state into a model and an optimiser that were built alike; returns its step.

    Raises:
        ValueError: if the state does not fit the model.
    """
    if not (folder / STATE_FILE).is_file():
        raise ValueError(f"{folder} has no {STATE_FILE}: it was not trained by torch; resume it with its own backend")
    state: dict[str, Any] = torch.load(folder / STATE_FILE, weights_only=True)
    saved = MoEForCausalLM.from_pretrained(folder).state_dict()
    try:
        model.load_state_dict(saved)
        if state["optimizer"] is None:  # of a run on several processes
            from .distributed.checkpoint import load_optimizer

            load_optimizer(folder, model, optimizer)
        else:
            optimizer.load_state_dict(state["optimizer"])
    except (RuntimeError, KeyError, ValueError) as error:
        raise ValueError(f"{folder} does not fit this model: {error}") from error
    model.model.optimizer_step = state["step"]
    if state["random"] is None:
        return state["step"]
    torch.set_rng_state(state["random"]["cpu"])
    if torch.cuda.is_available() and state["random"]["cuda"]:
        torch.cuda.set_rng_state_all(state["random"]["cuda"])
    return state["step"]


def publish(run: Path, checkpoint: Path) -> None:
    """Make the model of a checkpoint the run's own: `<run>` itself becomes a Hugging Face folder."""
    for path in sorted(checkpoint.iterdir(), key=lambda path: path.name == "config.json"):
        if not path.name.startswith("training_"):
            staging = run / f".{path.name}.part"
            shutil.copyfile(path, staging)
            os.replace(staging, run / path.name)


def _random_state() -> dict[str, Any]:
    return {
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _sync(folder: Path) -> None:
    """Force files to the disk before the folder gets its final name."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
