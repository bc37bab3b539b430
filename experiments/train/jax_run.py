"""Train with JAX: the same presets, data order, schedule, metrics and folders as `torch_run`."""

import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from moe import MoEConfig, adopt
from moe.nnx.parts.mesh import parse_mesh
from moe.nnx.training.optimisation import Optimisation
from moe.nnx.training.training import Trainer, resolve_precision

from .checkpoint import CheckpointPlace, write_checkpoint
from .corpus import BatchOrder, Corpus, windows
from .description.config import TrainConfig
from .loop import UNWATCHED, TrainResult, bits_per_byte, held_out_rows, precision_of, prepare, run_steps
from .metrics import balance_metrics
from .schedule import learning_rate
from .watching.watch import Watch


def train(
    config: TrainConfig,
    corpus: Corpus,
    run: Path,
    *,
    resume: bool = False,
    quiet: bool = False,
    mesh: str | None = None,
    watch: Watch = UNWATCHED,
) -> TrainResult:
    """Train a model; everything it leaves behind is under `run`.

    Args:
        config: settings, such as a preset.
        corpus: from `load_corpus`.
        run: folder for checkpoints, `metrics.jsonl`, and at the end the model with its tokenizer.
        resume: continue after the last finished checkpoint, bit by bit as if nothing had happened.
        quiet: no progress bar.
        mesh: devices per axis, such as `data=2,expert=4`; None takes the config's.
        watch: what else is shown of it.

    Returns:
        How it ended.

    Raises:
        ValueError: if `run` holds another run, one on another text or one of torch, the corpus is too short, the router
            has no twin in JAX, or the mesh does not fit.
        FloatingPointError: if the loss or its gradient is no longer finite; the last checkpoint is from before.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, once the step that it came in is done and saved; after a second one
            at once.
    """
    found = prepare(run, config, corpus, resume=resume)
    precision = precision_of(found[-1]) if found else resolve_precision(config.precision)
    config = replace(config, precision=precision, backend="jax", mesh=mesh or config.mesh)
    trainable = build(config, corpus, run, mesh=config.mesh)
    if not found:
        return run_steps(trainable, config, corpus, run, 0, quiet=quiet, watch=watch)
    trainable.trainer.restore(found[-1])
    return run_steps(
        trainable, config, corpus, run, int(found[-1].name.removeprefix("step_")), quiet=quiet, watch=watch
    )


@dataclass(frozen=True, eq=False)
class JaxRun:
    """A training run on JAX; see `loop.Trainable`."""

    trainer: Trainer
    order: BatchOrder
    corpus: Corpus
    config: TrainConfig
    run: Path

    def step(self, number: int) -> dict[str, Any]:
        start, A = time.perf_counter(), self.config.accumulation
        rate = learning_rate(self.config, number)
        token_ABS = np.stack([self.order.batch(number * A + micro) for micro in range(A)])
        result = self.trainer.step(token_ABS, rate, number)
        if not (np.isfinite(result.loss) and np.isfinite(result.gradient_norm)):
            norm = float(result.gradient_norm)
            raise FloatingPointError(f"diverged at step {number + 1}: loss {result.loss}, gradient norm {norm}")
        return {
            "step": number + 1,
            "loss": float(result.loss),
            "lm_loss": float(result.lm_loss),
            "learning_rate": rate,
            "gradient_norm": float(result.gradient_norm),
            "tokens_per_second": token_ABS.size / (time.perf_counter() - start),
            **balance_metrics(float(result.entropy), result.kept_LE),
        }

    def evaluate(self) -> float:
        rows, size = held_out_rows(self.corpus, self.config), self.config.batch_size
        batches = [rows[start : start + size] for start in range(0, len(rows), size)]
        filled = [
            np.pad(batch.astype(np.int32), ((0, size - len(batch)), (0, 0)), constant_values=-100) for batch in batches
        ]
        total = sum(self.trainer.evaluate(full) * len(batch) for full, batch in zip(filled, batches, strict=True))
        return bits_per_byte(total / len(rows), self.corpus, rows)

    def save(self, done: int) -> Path:
        return write_checkpoint(CheckpointPlace(self.run, self.config, self.corpus), done, self.trainer.save)


def build(
    config: TrainConfig, corpus: Corpus, run: Path, *, mesh: str | None = None, weights: Path | None = None
) -> JaxRun:
    """A run before its first step.

    Args:
        config, corpus, run, mesh: as for `train`.
        weights: a Hugging Face folder to start from; None draws weights from the seed (torch draws others).
    """
    how = Optimisation(
        weight_decay=config.weight_decay,
        betas=config.betas,
        muon_momentum=config.muon_momentum if config.optimizer == "muon" else None,
        clip_norm=config.clip_norm,
        precision=config.precision,
        seed=config.seed,
    )
    model = MoEConfig(**(corpus.model_settings | config.model))
    trainer = Trainer(model, how, mesh=None if mesh is None else parse_mesh(mesh))
    if weights is not None:
        trainer.start_from(weights)
    elif config.start_from is not None:
        _start_from(trainer, Path(config.start_from))
    order = BatchOrder(windows(corpus.train, config.sequence_length), config.batch_size, config.seed)
    return JaxRun(trainer, order, corpus, config, run)


def _start_from(trainer: Trainer, folder: Path) -> None:
    """Take over the weights of a checkpoint of any family, by way of torch."""
    with tempfile.TemporaryDirectory() as place:
        adopt(folder).save_pretrained(place)
        trainer.start_from(Path(place))
