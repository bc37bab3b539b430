"""What every training run does around its steps, whatever computes them: folder, metrics, evaluations, checkpoints."""

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from routing.ground.files import write_json

from .checkpoint import CONFIG_FILE, checkpoints, publish
from .corpus import Corpus, windows
from .interrupt import interrupt_noted
from .metrics import MetricsLog, open_log, read_log
from .presets import TrainConfig

LOG_FILE, TEXT_FILE = "metrics.jsonl", "training_text.json"
HARMLESS = ("precision", "evaluate_every", "checkpoint_every", "held_out_tokens")


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """How a run ended.

    Args:
        steps: optimiser steps done.
        held_out_bits_per_byte: of the final model.
        train_bits_per_byte: of the last step's batch.
        tokens_per_second: of the last step.
        seconds: wall time of this call, evaluations and checkpoints included.
    """

    steps: int
    held_out_bits_per_byte: float
    train_bits_per_byte: float
    tokens_per_second: float
    seconds: float


class Trainable(Protocol):
    """A model and its optimiser on one backend."""

    def step(self, number: int) -> dict[str, Any]:
        """Do the optimiser step after `number` others; its metrics, `lm_loss` in nats among them."""
        ...

    def evaluate(self) -> float:
        """Bits per byte on held-out documents."""
        ...

    def save(self, done: int) -> Path:
        """Write the checkpoint of `done` steps; its folder."""
        ...


def run_steps(
    trainable: Trainable,
    config: TrainConfig,
    corpus: Corpus,
    run: Path,
    done: int,
    *,
    quiet: bool,
    stop_after_s: float | None = None,
) -> TrainResult:
    """Train from step `done` to the end, or until the time is up; everything that is left behind is under `run`.

    Raises:
        KeyboardInterrupt: after Ctrl-C, once the step that it came in is done and saved; after a second one at once.
    """
    start = time.perf_counter()
    run.mkdir(parents=True, exist_ok=True)
    write_json(run / TEXT_FILE, {"source": corpus.source, "fingerprint": corpus.fingerprint})
    with (
        open_log(run / LOG_FILE, last_step=done) as log,
        _progress(config.steps, done, quiet) as advance,
        interrupt_noted() as is_interrupted,
    ):
        for step in range(done, config.steps):
            if stop_after_s is not None and time.perf_counter() - start > stop_after_s:
                break
            row = trainable.step(step)
            row["bits_per_byte"] = bits_per_byte(row["lm_loss"], corpus)
            done = step + 1
            _after_step(row, done, trainable, config, log)
            advance(row)
            if is_interrupted():
                trainable.save(done)
                raise KeyboardInterrupt
    publish(run, trainable.save(done))
    last = next(reversed(read_log(run / LOG_FILE)), {})
    seconds = time.perf_counter() - start
    result = TrainResult(
        steps=done,
        held_out_bits_per_byte=trainable.evaluate(),
        train_bits_per_byte=last.get("bits_per_byte", math.nan),
        tokens_per_second=last.get("tokens_per_second", math.nan),
        seconds=seconds,
    )
    write_json(run / "result.json", asdict(result))
    return result


def prepare(run: Path, config: TrainConfig, corpus: Corpus, *, resume: bool) -> list[Path]:
    """The finished checkpoints of a run that may start or continue, oldest first.

    Raises:
        ValueError: if there is nothing to resume, a run that was not to be resumed, or one with other settings or
            another text.
    """
    if run.exists() and not run.is_dir():
        raise ValueError(f"{run} is a file; a run needs a folder")
    found = checkpoints(run)
    if resume and not found:
        raise ValueError(f"nothing to resume: {run} has no finished checkpoint; start without --resume")
    if found and not resume:
        raise ValueError(f"{run} already holds a run ({found[-1].name}); use --resume to continue it or another --out")
    if found:
        _expect_same_run(_saved_config(found[-1]), json.loads(json.dumps(asdict(config))), run)
        expect_same_text(run, corpus)
    return found


def expect_same_text(run: Path, corpus: Corpus) -> None:
    """Raises ValueError if a run was begun on another text."""
    path = run / TEXT_FILE
    if not path.is_file():
        return
    begun = json.loads(path.read_text(encoding="utf-8"))
    if begun["fingerprint"] != corpus.fingerprint:
        raise ValueError(
            f"{run} was begun on another text ({begun['source']} as it was then; now {corpus.source}); "
            "give it that text again, or use another --out"
        )


def differences(begun: dict[str, Any], wanted: dict[str, Any]) -> str:
    """What is set otherwise than in a run that exists, in words; empty if nothing is."""
    changed = [name for name in wanted if begun.get(name) != wanted[name]]
    return ", ".join(f"{name} {begun.get(name)!r} there and {wanted[name]!r} now" for name in changed)


def precision_of(checkpoint: Path) -> str:
    """The precision that a run was started with."""
    return _saved_config(checkpoint)["precision"]


def _saved_config(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / CONFIG_FILE).read_text(encoding="utf-8"))


def _expect_same_run(begun: dict[str, Any], wanted: dict[str, Any], run: Path) -> None:
    """Only what cannot change the result may differ; the precision is taken from the run itself."""
    changed = differences(begun, {name: value for name, value in wanted.items() if name not in HARMLESS})
    if changed:
        raise ValueError(f"{run} was begun with other settings ({changed}); repeat them, or use another --out")


def bits_per_byte(nats_per_token: float, corpus: Corpus) -> float:
    """Cross entropy per token as bits per byte of text."""
    return nats_per_token / math.log(2) * corpus.tokens_per_byte


def held_out_rows(corpus: Corpus, config: TrainConfig) -> NDArray[np.integer]:
    """The held-out sequences that an evaluation scores."""
    rows = windows(corpus.held_out, min(config.sequence_length, len(corpus.held_out)))
    return rows[: max(1, config.held_out_tokens // rows.shape[1])]


def _after_step(row: dict[str, Any], done: int, trainable: Trainable, config: TrainConfig, log: MetricsLog) -> None:
    if done % config.evaluate_every == 0:
        row["held_out_bits_per_byte"] = trainable.evaluate()
    log.append(row)
    if done % config.checkpoint_every == 0:
        trainable.save(done)


@contextmanager
def _progress(total: int, done: int, quiet: bool) -> Iterator[Any]:
    columns = (
        TextColumn("train"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}  {task.fields[text]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, disable=quiet, console=Console(stderr=True)) as progress:
        task = progress.add_task("train", total=total, completed=done, text="")

        def advance(row: dict[str, Any]) -> None:
            text = f"{row['bits_per_byte']:.3f} bits/byte  {row['tokens_per_second']:.0f} tok/s"
            progress.update(task, advance=1, text=text)

        yield advance
