"""The folder of a run, without torch: its checkpoints, its settings, and whether it may start or continue."""

import json
import re
import shutil
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from .corpus import Corpus
from .description.config import TrainConfig

CONFIG_FILE, TEXT_FILE, LOG_FILE = "training_config.json", "training_text.json", "metrics.jsonl"
STATE_FILES = {"torch": "training_state.pt", "jax": "training_state.safetensors"}
OPTIMIZER_FOLDER = "training_optimizer"
"""The optimiser's state of a run on several processes, beside a `training_state.pt` that then lacks it."""
HARMLESS = ("precision", "evaluate_every", "checkpoint_every", "held_out_tokens", "backend", "mesh")
"""Settings that may differ when a run is continued: none of them changes a weight, or the run's own are taken."""
UNFINISHED = ".unfinished-"


def checkpoints(run: Path) -> list[Path]:
    """Finished checkpoints of a run, oldest first."""
    folder = run / "checkpoints"
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in found if re.fullmatch(r"step_\d{8}", path.name))


def expect_startable(run: Path, *, resume: bool) -> list[Path]:
    """The finished checkpoints of a run that may start or continue, oldest first.

    Raises:
        ValueError: if there is nothing to resume, or a run that was not to be resumed.
    """
    if run.exists() and not run.is_dir():
        raise ValueError(f"{run} is a file; a run needs a folder")
    found = checkpoints(run)
    if resume and not found:
        raise ValueError(f"nothing to resume: {run} has no finished checkpoint; start without --resume")
    if found and not resume:
        raise ValueError(f"{run} already holds a run ({found[-1].name}); use --resume to continue it or another --out")
    return found


def remove_unfinished(run: Path) -> None:
    """Remove what a killed process left half written."""
    for folder in (run / "checkpoints").glob(f"{UNFINISHED}*"):
        shutil.rmtree(folder)
    for file in run.glob(".*.part"):
        file.unlink()


def backend_of(checkpoint: Path) -> str:
    """`torch` or `jax`, from the optimiser's state that the checkpoint holds.

    Raises:
        ValueError: if it holds none.
    """
    for backend, name in STATE_FILES.items():
        if (checkpoint / name).is_file():
            return backend
    raise ValueError(f"{checkpoint} has none of {', '.join(STATE_FILES.values())}, so it cannot be continued")


def saved_config(checkpoint: Path) -> TrainConfig:
    """The settings that a run was started with.

    Raises:
        ValueError: if they cannot be read.
    """
    path = checkpoint / CONFIG_FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        known = {field.name for field in fields(TrainConfig)}
        if unknown := sorted(set(found) - known):
            raise ValueError(f"unknown settings {', '.join(unknown)}")
        return TrainConfig(**found | {"betas": tuple(found["betas"])})
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); start anew in another --out") from error


def saved_origin(run: Path) -> dict[str, Any]:
    """`data`, `column` and `tokenizer` of the run's text, as `load_corpus` takes them; empty in runs of before 0.2."""
    return _saved_text(run).get("origin", {})


def expect_same_text(run: Path, corpus: Corpus) -> None:
    """Raises ValueError if a run was begun on another text."""
    begun = _saved_text(run)
    if begun and begun["fingerprint"] != corpus.fingerprint:
        raise ValueError(
            f"{run} was begun on another text ({begun['source']} as it was then; now {corpus.source}); "
            "give it that text again, or use another --out"
        )


def _saved_text(run: Path) -> dict[str, Any]:
    path = run / TEXT_FILE
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read ({error}); start anew in another --out") from error


def expect_same_settings(run: Path, begun: TrainConfig, wanted: TrainConfig) -> None:
    """Raises ValueError if a run would be continued under settings that change its result."""
    ours = {name: value for name, value in plain(wanted).items() if name not in HARMLESS}
    if changed := differences(plain(begun), ours):
        raise ValueError(f"{run} was begun with other settings ({changed}); repeat them, or use another --out")


def plain(config: TrainConfig) -> dict[str, Any]:
    """The settings as they come back from a JSON file."""
    return json.loads(json.dumps(asdict(config)))


def differences(begun: dict[str, Any], wanted: dict[str, Any]) -> str:
    """What is set otherwise than in a run that exists, in words; of a group of settings only those that differ."""
    ours, theirs = _flat(wanted), _flat(begun)
    names = [name for name in [*ours, *theirs] if name.split(".")[0] in wanted]
    changed = [name for name in dict.fromkeys(names) if theirs.get(name) != ours.get(name)]
    return ", ".join(f"{name} {_said(theirs, name)} there and {_said(ours, name)} now" for name in changed)


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


def _said(settings: dict[str, Any], name: str) -> str:
    return repr(settings[name]) if name in settings else "the default"
