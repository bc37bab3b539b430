"""Train a small mixture-of-experts model on a text, killable and resumable at any moment."""

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch.optim import AdamW

from moe import MoEConfig, MoEForCausalLM, MoEOutput
from routing.traces import write_json

from .checkpoint import CONFIG_FILE, checkpoints, publish, restore, save_checkpoint
from .corpus import BatchOrder, Corpus, windows
from .metrics import MetricsLog, open_log, routing_metrics
from .precision import resolve_precision
from .presets import TrainConfig
from .schedule import learning_rate


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """How a run ended.

    Args:
        steps: optimiser steps done.
        held_out_bits_per_byte: of the final model.
        train_bits_per_byte: of the last step's batch.
        tokens_per_second: mean over the run's own steps.
        seconds: wall time, evaluations and checkpoints included.
    """

    steps: int
    held_out_bits_per_byte: float
    train_bits_per_byte: float
    tokens_per_second: float
    seconds: float


def train(config: TrainConfig, corpus: Corpus, run: Path, *, resume: bool = False, quiet: bool = False) -> TrainResult:
    """Train a model; everything it leaves behind is under `run`.

    Args:
        config: the run.
        corpus: the text.
        run: folder for checkpoints, `metrics.jsonl`, and at the end the model itself.
        resume: continue after the last finished checkpoint, bit by bit as if nothing had happened.
        quiet: no progress bar.

    Returns:
        How it ended.

    Raises:
        ValueError: if `run` holds another run, or the corpus is too short.
        KeyboardInterrupt: after Ctrl-C, once the last finished step is saved.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = _prepare(run, resume)
    precision = _precision_of(found[-1]) if found else resolve_precision(config.precision, device)
    config = replace(config, precision=precision)
    model, optimizer, order = build(config, corpus, device)
    done = restore(found[-1], model, optimizer) if found else 0
    start, row = time.perf_counter(), {}
    with open_log(run / "metrics.jsonl", last_step=done) as log, _progress(config.steps, done, quiet) as advance:
        try:
            for step in range(done, config.steps):
                row = train_step(model, optimizer, order, config, step)
                row["bits_per_byte"] = bits_per_byte(row["lm_loss"], corpus)
                done = step + 1
                _after_step(row, done, model, optimizer, corpus, config, run, log)
                advance(row)
        except KeyboardInterrupt:
            save_checkpoint(run, done, model, optimizer, config)
            raise
    final = save_checkpoint(run, done, model, optimizer, config)
    publish(run, final)
    seconds = time.perf_counter() - start
    result = TrainResult(
        steps=done,
        held_out_bits_per_byte=evaluate(model, corpus, config),
        train_bits_per_byte=row.get("bits_per_byte", math.nan),
        tokens_per_second=row.get("tokens_per_second", math.nan),
        seconds=seconds,
    )
    write_json(run / "result.json", asdict(result))
    return result


def train_step(
    model: MoEForCausalLM, optimizer: AdamW, order: BatchOrder, config: TrainConfig, step: int
) -> dict[str, Any]:
    """One optimiser step over `accumulation` micro-batches; returns its metrics."""
    start = time.perf_counter()
    device = next(model.parameters()).device
    rate = learning_rate(config, step)
    for group in optimizer.param_groups:
        group["lr"] = rate
    loss = lm_loss = 0.0
    count_LR = kept_LR = 0
    for micro in range(config.accumulation):
        token_BS = torch.from_numpy(order.batch(step * config.accumulation + micro)).to(device)
        with autocast(config.precision, device):
            output: MoEOutput = model(token_BS, labels=token_BS, use_cache=False)
        (output.loss / config.accumulation).backward()
        loss += output.loss.item() / config.accumulation
        lm_loss += output.lm_loss.item() / config.accumulation
        count_LR = count_LR + torch.stack([layer.count_R for layer in output.router_stats])
        kept_LR = kept_LR + torch.stack([layer.kept_R for layer in output.router_stats])
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
    optimizer.step()
    optimizer.zero_grad()
    tokens = config.accumulation * config.batch_size * config.sequence_length
    model.model.post_step(count_LR, tokens)
    return {
        "step": step + 1,
        "loss": loss,
        "lm_loss": lm_loss,
        "learning_rate": rate,
        "gradient_norm": norm.item(),
        "tokens_per_second": tokens / (time.perf_counter() - start),
        **routing_metrics(output.router_stats, kept_LR[:, : model.config.num_experts]),
    }


@torch.no_grad()
def evaluate(model: MoEForCausalLM, corpus: Corpus, config: TrainConfig) -> float:
    """Bits per byte on held-out documents."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    rows = windows(corpus.held_out, min(config.sequence_length, len(corpus.held_out)))
    rows = rows[: max(1, config.held_out_tokens // rows.shape[1])]
    total = 0.0
    for start in range(0, len(rows), config.batch_size):
        batch = rows[start : start + config.batch_size]
        token_BS = torch.from_numpy(batch.astype("int64")).to(device)
        with autocast(config.precision, device):
            total += model(token_BS, labels=token_BS, use_cache=False).lm_loss.item() * len(batch)
    model.train(was_training)
    return bits_per_byte(total / len(rows), corpus)


def build(config: TrainConfig, corpus: Corpus, device: torch.device) -> tuple[MoEForCausalLM, AdamW, BatchOrder]:
    """The model as its seed initialises it, its optimiser, and the order of its batches."""
    torch.manual_seed(config.seed)
    model = MoEForCausalLM(MoEConfig(**({"vocab_size": corpus.vocab_size} | config.model))).to(device).train()
    order = BatchOrder(windows(corpus.train, config.sequence_length), config.batch_size, config.seed)
    return model, build_optimizer(model, config), order


def build_optimizer(model: MoEForCausalLM, config: TrainConfig) -> AdamW:
    """AdamW; matrices decay, norms and biases do not."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)


def autocast(precision: str, device: torch.device) -> torch.autocast | nullcontext:
    """bfloat16 autocast, or nothing for float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bfloat16" else nullcontext()


def bits_per_byte(nats_per_token: float, corpus: Corpus) -> float:
    """Cross entropy per token as bits per byte of text."""
    return nats_per_token / math.log(2) * corpus.tokens_per_byte


def _after_step(
    row: dict[str, Any],
    done: int,
    model: MoEForCausalLM,
    optimizer: AdamW,
    corpus: Corpus,
    config: TrainConfig,
    run: Path,
    log: MetricsLog,
) -> None:
    if done % config.evaluate_every == 0:
        row["held_out_bits_per_byte"] = evaluate(model, corpus, config)
    log.append(row)
    if done % config.checkpoint_every == 0:
        save_checkpoint(run, done, model, optimizer, config)


def _prepare(run: Path, resume: bool) -> list[Path]:
    found = checkpoints(run)
    if resume and not found:
        raise ValueError(f"nothing to resume: {run} has no finished checkpoint; start without --resume")
    if found and not resume:
        raise ValueError(f"{run} already holds a run ({found[-1].name}); use --resume to continue it or another --out")
    run.mkdir(parents=True, exist_ok=True)
    return found


def _precision_of(checkpoint: Path) -> str:
    return json.loads((checkpoint / CONFIG_FILE).read_text(encoding="utf-8"))["precision"]


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


def measure_step_s(config: TrainConfig, corpus: Corpus, *, num_steps: int = 4) -> float:
    """Median seconds of an optimiser step of this run here, on a model that is thrown away."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = replace(config, precision=resolve_precision(config.precision, device))
    model, optimizer, order = build(config, corpus, device)
    train_step(model, optimizer, order, config, 0)
    seconds = []
    for step in range(num_steps):
        start = time.perf_counter()
        train_step(model, optimizer, order, config, step)
        seconds.append(time.perf_counter() - start)
    return sorted(seconds)[num_steps // 2]
