"""Train a small mixture-of-experts model on a text, killable and resumable at any moment."""

import math
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from moe import MoEConfig, MoEForCausalLM, MoEOutput

from .checkpoint import CheckpointPlace, restore, save_checkpoint
from .corpus import BatchOrder, Corpus, windows
from .description.config import TrainConfig
from .description.starting import load_start
from .loop import UNWATCHED, TrainResult, bits_per_byte, held_out_rows, precision_of, prepare, run_steps
from .metrics import routing_metrics
from .optimisers.build import Together, build_optimizer
from .precision import resolve_precision
from .schedule import learning_rate
from .watching.watch import Watch


def train(
    config: TrainConfig,
    corpus: Corpus,
    run: Path,
    *,
    resume: bool = False,
    quiet: bool = False,
    stop_after_s: float | None = None,
    watch: Watch = UNWATCHED,
) -> TrainResult:
    """Train a model; everything it leaves behind is under `run`.

    Args:
        config: settings, such as a preset.
        corpus: from `load_corpus`.
        run: folder for checkpoints, `metrics.jsonl`, and at the end the model with its tokenizer.
        resume: continue after the last finished checkpoint, bit by bit as if nothing had happened.
        quiet: no progress bar.
        stop_after_s: end early after so many seconds, wherever the schedule is.
        watch: what else is shown of it.

    Returns:
        How it ended.

    Raises:
        ValueError: if `run` holds another run or one on another text, or the corpus is too short.
        FloatingPointError: if the loss or its gradient is no longer finite; the last checkpoint is from before.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, once the step that it came in is done and saved; after a second one
            at once.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = prepare(run, config, corpus, resume=resume)
    precision = precision_of(found[-1]) if found else resolve_precision(config, device)
    config = replace(config, precision=precision)
    model, optimizer, order = build(config, corpus, device)
    done = restore(found[-1], model, optimizer) if found else 0
    trainable = _TorchRun(model, optimizer, order, corpus, config, run)
    return run_steps(trainable, config, corpus, run, done, quiet=quiet, stop_after_s=stop_after_s, watch=watch)


@dataclass(frozen=True, eq=False)
class _TorchRun:
    model: MoEForCausalLM
    optimizer: Optimizer | Together
    order: BatchOrder
    corpus: Corpus
    config: TrainConfig
    run: Path

    def step(self, number: int) -> dict[str, Any]:
        return train_step(self.model, self.optimizer, self.order, self.config, number)

    def evaluate(self) -> float:
        return evaluate(self.model, self.corpus, self.config)

    def save(self, done: int) -> Path:
        return save_checkpoint(CheckpointPlace(self.run, self.config, self.corpus), done, self.model, self.optimizer)


def train_step(
    model: MoEForCausalLM, optimizer: Optimizer | Together, order: BatchOrder, config: TrainConfig, step: int
) -> dict[str, Any]:
    """One optimiser step over `accumulation` micro-batches; returns its metrics."""
    start = time.perf_counter()
    device = next(model.parameters()).device
    rate = learning_rate(config, step)
    for group in optimizer.param_groups:
        group["lr"] = rate
    loss = lm_loss = 0.0
    counts: list[Tensor] = []
    loads: list[Tensor] = []
    for micro in range(config.accumulation):
        token_BS = torch.from_numpy(order.batch(step * config.accumulation + micro)).to(device)
        seed_noise(config.seed, step, micro)
        with autocast(config.precision, device):
            output: MoEOutput = model(token_BS, labels=token_BS, use_cache=False)
        (output.loss / config.accumulation).backward()
        loss += output.loss.item() / config.accumulation
        lm_loss += output.lm_loss.item() / config.accumulation
        counts = _added(counts, [call.count_R for call in output.router_stats])
        loads = _added(loads, [call.kept_R[: call.num_experts] for call in output.router_stats])
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
    if not (math.isfinite(loss) and torch.isfinite(norm)):
        raise FloatingPointError(f"diverged at step {step + 1}: loss {loss}, gradient norm {norm.item()}")
    optimizer.step()
    optimizer.zero_grad()
    tokens = config.accumulation * config.batch_size * config.sequence_length
    model.model.post_step(counts, tokens)
    return {
        "step": step + 1,
        "loss": loss,
        "lm_loss": lm_loss,
        "learning_rate": rate,
        "gradient_norm": norm.item(),
        "tokens_per_second": tokens / (time.perf_counter() - start),
        **routing_metrics(output.router_stats, loads),
    }


def seed_noise(seed: int, step: int, micro: int) -> None:
    """Make the noise of a micro-batch its own: the same in whatever process, and after whatever, it is computed."""
    (word,) = np.random.SeedSequence([seed, step, micro]).generate_state(1, np.uint64)
    torch.manual_seed(int(word))


def _added(totals: list[Tensor], counts: list[Tensor]) -> list[Tensor]:
    return [total + count for total, count in zip(totals, counts, strict=True)] if totals else counts


@torch.no_grad()
def evaluate(model: MoEForCausalLM, corpus: Corpus, config: TrainConfig) -> float:
    """Bits per byte on held-out documents."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    rows = held_out_rows(corpus, config)
    total = 0.0
    for start in range(0, len(rows), config.batch_size):
        batch = rows[start : start + config.batch_size]
        token_BS = torch.from_numpy(batch.astype("int64")).to(device)
        with autocast(config.precision, device):
            total += model(token_BS, labels=token_BS, use_cache=False).lm_loss.item() * len(batch)
    model.train(was_training)
    return bits_per_byte(total / len(rows), corpus, rows)


def build(
    config: TrainConfig, corpus: Corpus, device: torch.device
) -> tuple[MoEForCausalLM, Optimizer | Together, BatchOrder]:
    """The model before its first step, its optimiser, and the order of its batches."""
    model = build_model(config, corpus, device)
    order = BatchOrder(windows(corpus.train, config.sequence_length), config.batch_size, config.seed)
    return model, build_optimizer(model, config), order


def build_model(config: TrainConfig, corpus: Corpus, device: torch.device) -> MoEForCausalLM:
    """The model as its seed initialises it, or with the weights of the checkpoint that the run starts from.

    Raises:
        ValueError: if that checkpoint does not fit, or the text has tokens that the model does not know.
    """
    torch.manual_seed(config.seed)
    model = MoEForCausalLM(MoEConfig(**(corpus.model_settings | config.model)))
    if corpus.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"{corpus.source} is read as {corpus.vocab_size} tokens, the model knows {model.config.vocab_size}; "
            "give the tokenizer of the model"
        )
    if config.start_from is not None:
        load_start(config.start_from, model)
    return model.to(device).train()


def autocast(precision: str, device: torch.device) -> torch.autocast | nullcontext:
    """bfloat16 autocast, or nothing for float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bfloat16" else nullcontext()


def measure_step_s(config: TrainConfig, corpus: Corpus, *, num_steps: int = 4) -> float:
    """Median seconds of an optimiser step of this run here, on a model that is thrown away."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = replace(config, precision=resolve_precision(config, device))
    model, optimizer, order = build(config, corpus, device)
    train_step(model, optimizer, order, config, 0)
    seconds = []
    for step in range(num_steps):
        start = time.perf_counter()
        train_step(model, optimizer, order, config, step)
        seconds.append(time.perf_counter() - start)
    return sorted(seconds)[num_steps // 2]
