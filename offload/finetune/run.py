"""A run of fine-tuning: its folder, its metrics, its commits, and how it continues after any of them.

`OUT/checkpoints/step_<n>` is a commit: whole, or not there. It holds everything but experts, whose records lie in
`OUT/experts` at places that the commit names. A run continues after its last commit, bit by bit.
"""

import errno
import json
import math
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from routing.ground.files import atomic_write, write_json

from .options import TuneOptions
from .passing.experts import TunedExperts
from .peers import Peers
from .storage.records import force_to_disk

SETTINGS_FILE, LOG_FILE, STATE_FILE, TABLE_FILE = "finetune.json", "metrics.jsonl", "state.safetensors", "commit.json"
EXPERTS_FOLDER, CHECKPOINTS = "experts", "checkpoints"
UNFINISHED = ".unfinished-"
ENTRIES = ("config.json", "adapter_config.json")
"""Files without which nobody takes a folder for a model or an adapter."""


class Tuning(Protocol):
    """A method with its model, ready to go on."""

    experts: TunedExperts

    def close(self) -> None:
        """End threads, close files."""
        ...

    def step(self, number: int) -> dict[str, Any]:
        """Do the optimiser step after `number` others; its metrics."""
        ...

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Tensors and facts of a commit; what they name on the disk is forced there."""
        ...

    def committed(self) -> None:
        """What `state` gave is safe."""
        ...

    def restore(self, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
        """Continue from a commit."""
        ...

    def publish(self, out: Path) -> None:
        """Write what the run was for into an empty folder."""
        ...


def begin(out: Path, options: TuneOptions, model: str, fingerprint: str, *, resume: bool) -> Path | None:
    """Make the folder of a run, or find the commit that it continues from.

    Raises:
        ValueError: if `out` holds another run, or there is nothing to resume.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; a run needs a folder")
    settings, found = out / SETTINGS_FILE, commits(out)
    has_begun = settings.is_file() and (bool(found) or (out / LOG_FILE).is_file())
    if has_begun and not resume:
        raise ValueError(f"{out} already holds a run; use --resume to continue it, or another --out")
    if settings.is_file() and resume:
        begun = _read_json(settings)
        options.expect_continues(begun.get("options", {}))
        if begun.get("data") != fingerprint:
            raise ValueError(f"{out} was begun on other examples; give it those again, or use another --out")
    elif resume:
        raise ValueError(f"nothing to resume: {out} holds no run; start without --resume")
    elif not settings.is_file() and out.is_dir() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty; give a new folder")
    out.mkdir(parents=True, exist_ok=True)
    for folder in (out, out / CHECKPOINTS):
        for leftover in folder.glob(f"{UNFINISHED}*"):
            shutil.rmtree(leftover)
    write_json(settings, {"model": model, "options": options.as_json(), "data": fingerprint})
    return found[-1] if found else None


def commits(out: Path) -> list[Path]:
    """Finished commits of a run, oldest first."""
    folder = out / CHECKPOINTS
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in found if re.fullmatch(r"step_\d{8}", path.name))


def continue_from(tuning: Tuning, commit: Path | None) -> int:
    """Put a commit's state into a method; the steps that are done.

    Raises:
        ValueError: if the commit cannot be read or is of another model.
    """
    if commit is None:
        return 0
    try:
        facts = _read_json(commit / TABLE_FILE)
        tuning.restore(load_file(commit / STATE_FILE), facts)
        return int(facts["step"])
    except (OSError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{commit} cannot be continued ({error}); start anew in another --out") from error


def run_steps(
    tuning: Tuning,
    options: TuneOptions,
    out: Path,
    done: int,
    advance: Callable[[dict[str, Any]], None],
    is_interrupted: Callable[[], bool],
    peers: Peers,
) -> dict[str, Any]:
    """Do all steps that are left, commit every so many, and write the result.

    Args:
        tuning: the method, after `continue_from`.
        options: the run's settings.
        out: the run's folder.
        done: steps that are done.
        advance: told the metrics of each step.
        is_interrupted: asked after each step; then the step is committed.
        peers: the processes that do the run together; process 0 writes.

    Returns:
        The metrics of the last step.

    Raises:
        KeyboardInterrupt: on process 0, if it was interrupted.
        FloatingPointError: if the loss is no longer finite; the last commit is from before.
        OSError: if the disk is full; the last commit is whole.
    """
    row: dict[str, Any] = {}
    is_writer = peers.number == 0
    with open_log(out / LOG_FILE, last_step=done) if is_writer else nullcontext(_ignore) as log:
        for number in range(done, options.steps):
            row = _timed_step(tuning, options, number, peers)
            log(row)
            advance(row)
            is_last, is_ended = number + 1 == options.steps, any(peers.gather(is_interrupted()))
            if is_last or is_ended or (number + 1) % options.checkpoint_every == 0:
                commit(tuning, out, number + 1, peers)
            if is_ended and not is_last:
                if is_writer:
                    raise KeyboardInterrupt
                return row
        if is_writer:
            _publish(tuning, out)
    return row


def _ignore(row: dict[str, Any]) -> None:
    """Process 0 keeps the log of all."""


@contextmanager
def full_disk_named(out: Path) -> Iterator[None]:
    """Say that the disk is full, whichever file it came to light with.

    Raises:
        OSError: in place of those of a full disk.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if _error_number(error) not in (errno.ENOSPC, errno.EDQUOT):
            raise
        told = "the disk is full; the run is intact up to its last commit: make room, then --resume"
        raise OSError(errno.ENOSPC, f"{out}: {told}") from error


def _error_number(error: OSError | SafetensorError) -> int | None:
    """The system's number of an error; safetensors has it in its text only."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"os error (\d+)", str(error))
    return int(found[1]) if found else None


def _publish(tuning: Tuning, out: Path) -> None:
    """Write the result beside its place, then move it there: a folder that loads is whole."""
    with tempfile.TemporaryDirectory(dir=out, prefix=UNFINISHED) as staging:
        tuning.publish(Path(staging))
        for name in ENTRIES:
            (out / name).unlink(missing_ok=True)
        for file in sorted(Path(staging).iterdir(), key=lambda file: file.name in ENTRIES):
            file.replace(out / file.name)


def _timed_step(tuning: Tuning, options: TuneOptions, number: int, peers: Peers) -> dict[str, Any]:
    started, traffic = time.perf_counter(), tuning.experts.visits.traffic
    before = dict(vars(traffic))
    found = tuning.step(number)
    if not math.isfinite(found["loss"]):
        raise FloatingPointError(f"diverged at step {number + 1}: loss {found['loss']}")
    own = {name: value - before[name] for name, value in vars(traffic).items()}
    found_by = peers.gather((own, [count_E.numpy().copy() for count_E in tuning.experts.count_LE]))
    moved = {name: sum(of_one[name] for of_one, _ in found_by) for name in own}
    counts = [np.sum(counts_P, axis=0) for counts_P in zip(*(of_one for _, of_one in found_by), strict=True)]
    row = {
        "step": number + 1,
        **found,
        "learning_rate": options.rate_at(number + 1),
        "tokens_per_second": options.rows_per_step * options.sequence_length / (time.perf_counter() - started),
        **_balance(counts),
        "hit_rate": moved["hits"] / max(moved["hits"] + moved["misses"], 1),
        "bytes_read": moved["bytes_read"],
        "bytes_written": moved["bytes_written"],
        "bytes_in_vain": moved["bytes_in_vain"],
    }
    for count_E in tuning.experts.count_LE:
        count_E.zero_()
    return row


def _balance(count_LE: list[np.ndarray]) -> dict[str, Any]:
    """How evenly a step's rows went to experts, in the words of `expertier train`."""
    peaks = [count_E.max() / max(count_E.mean(), 1e-30) - 1 for count_E in count_LE]
    shares = [[round(float(share), 4) for share in count_E / max(count_E.sum(), 1)] for count_E in count_LE]
    return {
        "max_vio": float(np.mean(peaks)),
        "dead_experts": int(sum((count_E == 0).sum() for count_E in count_LE)),
        "load": shares,
    }


def commit(tuning: Tuning, out: Path, step: int, peers: Peers) -> None:
    """Write `OUT/checkpoints/step_<n>`; the one before it is removed afterwards. All processes call this together."""
    tensors, facts = tuning.state()
    if peers.number == 0:
        _write_commit(out / CHECKPOINTS, step, tensors, facts)
    peers.gather(None)
    tuning.committed()
    if peers.number == 0:
        for old in commits(out)[:-1]:
            shutil.rmtree(old)


def _write_commit(folder: Path, step: int, tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
    folder.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=UNFINISHED) as staging:
        finished = Path(staging) / "commit"
        finished.mkdir()
        save_file(tensors, finished / STATE_FILE)
        write_json(finished / TABLE_FILE, {"step": step, **facts})
        force_to_disk(finished / STATE_FILE)
        force_to_disk(finished)
        finished.rename(folder / f"step_{step:08}")
    force_to_disk(folder)


@contextmanager
def open_log(path: Path, *, last_step: int) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Open `metrics.jsonl` of a run that continues after `last_step`; later lines are dropped, and torn ones."""
    if path.exists():
        kept = [row for row in read_log(path) if row["step"] <= last_step]
        with atomic_write(path) as file:
            file.writelines(json.dumps(row) + "\n" for row in kept)
    with path.open("a", encoding="utf-8") as stream:

        def append(row: dict[str, Any]) -> None:
            stream.write(json.dumps(row, allow_nan=False) + "\n")
            stream.flush()

        yield append


def read_log(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a log, in order."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); start anew in another --out") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object; start anew in another --out")
    return found
