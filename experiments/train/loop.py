"""What every training run does around its steps, whatever computes them: folder, metrics, evaluations, checkpoints."""

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from routing.ground.files import write_json

from .checkpoint import publish
from .corpus import Corpus, windows
from .description.config import TrainConfig
from .description.description import write_run_file
from .interrupt import interrupt_noted
from .metrics import MetricsLog, open_log, read_log, without_nan
from .run_folder import (
    LOG_FILE,
    TEXT_FILE,
    expect_same_settings,
    expect_same_text,
    expect_startable,
    remove_unfinished,
    saved_config,
)
from .watching.alerts import Alarm
from .watching.watch import Watch

UNWATCHED = Watch()


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """How a run ended.

    Args:
        steps: optimiser steps done.
        held_out_bits_per_byte: of the final model, over the bytes of the held-out tokens that were scored.
        train_bits_per_byte: of the last step's batch, with the training text's bytes per token; NaN without a step.
        tokens_per_second: of the last step; NaN without one.
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
    watch: Watch = UNWATCHED,
) -> TrainResult:
    """Train from step `done` to the end, or until the time is up; everything that is left behind is under `run`.

    Raises:
        KeyboardInterrupt: after Ctrl-C or SIGTERM, once the step that it came in is done and saved; after a second one
            at once.
    """
    start = time.perf_counter()
    run.mkdir(parents=True, exist_ok=True)
    write_json(run / TEXT_FILE, {"source": corpus.source, "fingerprint": corpus.fingerprint, "origin": corpus.origin})
    write_run_file(run, config, corpus.origin | {"text_fingerprint": corpus.fingerprint})
    alarm = Alarm(config.model)
    with (
        open_log(run / LOG_FILE, last_step=done) as log,
        watch.open(run, config.steps, done, quiet=quiet) as see,
        interrupt_noted() as is_interrupted,
    ):
        for step in range(done, config.steps):
            if stop_after_s is not None and time.perf_counter() - start > stop_after_s:
                break
            row = trainable.step(step)
            row["bits_per_byte"] = train_bits_per_byte(row["lm_loss"], corpus)
            row["alerts"] = alarm.see(row)
            done = step + 1
            _after_step(row, done, trainable, config, log)
            see(row)
            if is_interrupted():
                trainable.save(done)
                raise KeyboardInterrupt
    publish(run, trainable.save(done))
    last = next(reversed(read_log(run / LOG_FILE)), {})
    result = TrainResult(
        steps=done,
        seconds=time.perf_counter() - start,
        held_out_bits_per_byte=trainable.evaluate(),
        train_bits_per_byte=_number(last.get("bits_per_byte")),
        tokens_per_second=_number(last.get("tokens_per_second")),
    )
    write_json(run / "result.json", without_nan(asdict(result)))
    watch.finish(run)
    return result


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def prepare(run: Path, config: TrainConfig, corpus: Corpus, *, resume: bool) -> list[Path]:
    """The finished checkpoints of a run that may start or continue, oldest first; leftovers of a kill are removed.

    Raises:
        ValueError: if there is nothing to resume, a run that was not to be resumed, one with other settings or on
            another text, or a text that is too short to train on or to score.
    """
    found = expect_startable(run, resume=resume)
    for part, stream in (("training", corpus.train), ("held-out", corpus.held_out)):
        if len(stream) < config.sequence_length:
            raise ValueError(
                f"the {part} text of {corpus.source} has {len(stream)} tokens, fewer than one sequence of "
                f"{config.sequence_length}; give more text, or a preset with shorter sequences"
            )
    if found:
        expect_same_settings(run, saved_config(found[-1]), config)
        expect_same_text(run, corpus)
    remove_unfinished(run)
    return found


def precision_of(checkpoint: Path) -> str:
    """The precision that a run was started with."""
    return saved_config(checkpoint).precision


def bits_per_byte(nats_per_token: float, corpus: Corpus, rows_BS: NDArray[np.integer] | None = None) -> float:
    """Cross entropy on held-out text as bits per byte of that same text.

    Args:
        nats_per_token: mean over the tokens that were predicted.
        corpus: where they are from.
        rows_BS: the held-out rows that were scored, as from `held_out_rows`; a row's first token is not predicted.
            None stands for the whole held-out part.
    """
    if corpus.held_out_bytes is None:
        return train_bits_per_byte(nats_per_token, corpus)
    sizes = corpus.held_out_bytes
    if rows_BS is not None:
        sizes = sizes[: rows_BS.size].reshape(rows_BS.shape)[:, 1:]
    return nats_per_token / math.log(2) * sizes.size / max(float(sizes.sum(dtype=np.float64)), 1.0)


def train_bits_per_byte(nats_per_token: float, corpus: Corpus) -> float:
    """Cross entropy on training text as bits per byte, with the mean ratio of tokens to bytes of all of it."""
    return nats_per_token / math.log(2) * corpus.tokens_per_byte


def held_out_rows(corpus: Corpus, config: TrainConfig) -> NDArray[np.integer]:
    """The held-out sequences that an evaluation scores, from the start of the stream on without gaps."""
    rows = windows(corpus.held_out, min(config.sequence_length, len(corpus.held_out)))
    return rows[: max(1, config.held_out_tokens // rows.shape[1])]


def _after_step(row: dict[str, Any], done: int, trainable: Trainable, config: TrainConfig, log: MetricsLog) -> None:
    if done % config.evaluate_every == 0:
        row["held_out_bits_per_byte"] = trainable.evaluate()
    log.append(row)
    if done % config.checkpoint_every == 0:
        trainable.save(done)
