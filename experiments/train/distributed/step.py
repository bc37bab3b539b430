"""One optimiser step whose micro-batches are shared out over processes; equal to one process, but for rounding.

A micro-batch is the unit of everything that is computed over a batch: balance losses, capacities, noise. Which process
computes it changes nothing. Every process passes the model equally often; one that has no micro-batch left repeats one
without counting it, because the others need its part of the weights.

Shapes: R routable experts, E experts, S positions, A micro-batches of a step, W processes.
"""

import math
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed
from torch.optim import AdamW

from moe import MoEForCausalLM, MoEOutput
from moe.parallel import Degree, Split, average_gradients, clip_gradients

from ..corpus import BatchOrder, Corpus
from ..description.config import TrainConfig
from ..loop import bits_per_byte, held_out_rows
from ..metrics import balance_metrics
from ..schedule import learning_rate
from ..torch_run import autocast, seed_noise
from .adapting import facts


@dataclass(frozen=True, kw_only=True, eq=False)
class Parts:
    """A run as one process has it.

    Args:
        model: split by `split`.
        split: how.
        optimizer: over this process's parts.
        order: of all micro-batches, the same on every process.
        corpus, config: of the run.
    """

    model: MoEForCausalLM
    split: Split
    optimizer: AdamW
    order: BatchOrder
    corpus: Corpus
    config: TrainConfig


def distributed_step(parts: Parts, step: int, degree: Degree | None = None) -> dict[str, Any]:
    """One optimiser step, called by all processes together; the same metrics on each.

    Args:
        parts: of this process.
        step: how many were done before.
        degree: of the step, the same on all processes; None where the layout is fixed.

    Raises:
        FloatingPointError: on every process, if the loss or the gradient is no longer finite.
    """
    start, config = time.perf_counter(), parts.config
    rate = learning_rate(config, step)
    for group in parts.optimizer.param_groups:
        group["lr"] = rate
    if degree is not None:
        parts.split.take(degree)
    for bank in parts.split.experts:
        bank.traffic.clear()
    seen = accumulate(parts, step)
    average_gradients(parts.split)
    norm = clip_gradients(parts.model.parameters(), config.clip_norm)
    if not (math.isfinite(seen.loss) and torch.isfinite(norm)):
        raise FloatingPointError(f"diverged at step {step + 1}: loss {seen.loss}, gradient norm {norm.item()}")
    parts.optimizer.step()
    parts.optimizer.zero_grad()
    _share_notes(parts)
    tokens = config.accumulation * config.batch_size * config.sequence_length
    parts.model.model.post_step(seen.counts, tokens)
    balance = balance_metrics(seen.entropy, torch.stack(seen.loads).numpy()) if seen.loads else {}
    return {
        "step": step + 1,
        "loss": seen.loss,
        "lm_loss": seen.lm_loss,
        "learning_rate": rate,
        "gradient_norm": norm.item(),
        "tokens_per_second": tokens / (time.perf_counter() - start),
        "processes": parts.split.layout.processes,
        "dispatched_bytes": seen.dispatched_bytes,
        **balance,
        **({} if degree is None else facts(degree, _busiest_rows(seen.loads, parts), _slowest_s(start))),
    }


def _busiest_rows(loads: list[Tensor], parts: Parts) -> int:
    """Rows that the busiest process would compute if only tokens travelled, summed over layers."""
    W = parts.split.layout.processes
    return sum(int(load_E.view(W, -1).sum(dim=1).max()) for load_E in loads)


def _slowest_s(start: float) -> float:
    """Seconds since the step began, of the process that took longest."""
    seconds = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
    distributed.all_reduce(seconds, distributed.ReduceOp.MAX)
    return seconds.item()


@dataclass(frozen=True, kw_only=True, eq=False)
class Seen:
    """What all processes saw in a step, summed over micro-batches; the entropy is of the last one."""

    loss: float
    lm_loss: float
    entropy: float
    dispatched_bytes: int
    counts: list[Tensor]
    loads: list[Tensor]


def accumulate(parts: Parts, step: int) -> Seen:
    """Gradients of this process's micro-batches, averaged over processes where FSDP2 does it; what all saw in them.

    Args:
        parts: of this process; all processes call this together.
        step: whose micro-batches they are.
    """
    config, rank, W = parts.config, distributed.get_rank(), parts.split.layout.processes
    A = config.accumulation
    rounds = -(-A // W)
    device = next(parts.model.parameters()).device
    sums = torch.zeros(3, dtype=torch.float64)
    counts: list[Tensor] = []
    loads: list[Tensor] = []
    for turn in range(rounds):
        micro = turn * W + rank
        share = float(micro < A)
        token_BS = torch.from_numpy(parts.order.batch(step * A + min(micro, A - 1))).to(device)
        parts.model.set_requires_gradient_sync(turn == rounds - 1)
        seed_noise(config.seed, step, min(micro, A - 1))
        with autocast(config.precision, device), _views_allowed():
            output: MoEOutput = parts.model(token_BS, labels=token_BS, use_cache=False)
        # FSDP2 averages over W processes, the step over A micro-batches
        (output.loss * (share * W / A)).backward()
        stats = output.router_stats
        entropy = sum(call.entropy.item() for call in stats) / max(len(stats), 1) if micro == A - 1 else 0.0
        sums += torch.tensor([output.loss.item() * share / A, output.lm_loss.item() * share / A, entropy])
        counts = _added(counts, [call.count_R * int(share) for call in stats])
        loads = _added(loads, [call.kept_R[: call.num_experts] * int(share) for call in stats])
    return _summed(parts, sums, counts, loads)


@contextmanager
def _views_allowed() -> Iterator[None]:
    """Silence FSDP2's warning of layers that return views: a carry may hold some, and nothing writes into a carry."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        yield


def _added(totals: list[Tensor], counts: list[Tensor]) -> list[Tensor]:
    return [total + count for total, count in zip(totals, counts, strict=True)] if totals else counts


def _summed(parts: Parts, sums: Tensor, counts: list[Tensor], loads: list[Tensor]) -> Seen:
    """All processes' sums, by one all-reduce; float64 holds every count exactly."""
    moved = sum(bank.traffic.remote_bytes for bank in parts.split.experts)
    tables = [*counts, *loads]
    flat = torch.cat([sums, torch.tensor([float(moved)]).double(), *(table.double().cpu() for table in tables)])
    distributed.all_reduce(flat)
    loss, lm_loss, entropy, moved = flat[:4].tolist()
    pieces = flat[4:].split([len(table) for table in tables]) if tables else ()
    found = [piece.to(table) for piece, table in zip(pieces, tables, strict=True)]
    return Seen(
        loss=loss,
        lm_loss=lm_loss,
        entropy=entropy,
        dispatched_bytes=int(moved),
        counts=found[: len(counts)],
        loads=[load.cpu() for load in found[len(counts) :]],
    )


def _share_notes(parts: Parts) -> None:
    """What routers noted of the step's last micro-batch, from the process that computed it to all others."""
    owner = (parts.config.accumulation - 1) % parts.split.layout.processes
    for router in parts.model.model.routers:
        for note in router.notes():
            distributed.broadcast(note, src=owner)


@torch.no_grad()
def distributed_evaluation(parts: Parts) -> float:
    """Bits per byte on held-out documents, whose batches are shared out over the processes."""
    model, config, W = parts.model, parts.config, parts.split.layout.processes
    rows = held_out_rows(parts.corpus, config)
    batches = [rows[start : start + config.batch_size] for start in range(0, len(rows), config.batch_size)]
    device = next(model.parameters()).device
    total_N = torch.zeros(len(batches), dtype=torch.float64)
    model.eval()
    for turn in range(-(-len(batches) // W)):
        number = turn * W + distributed.get_rank()
        batch = batches[min(number, len(batches) - 1)]
        token_BS = torch.from_numpy(batch.astype("int64")).to(device)
        with autocast(config.precision, device):
            loss = model(token_BS, labels=token_BS, use_cache=False).lm_loss.item()
        if number < len(batches):
            total_N[number] = loss * len(batch)
    model.train()
    distributed.all_reduce(total_N)
    return bits_per_byte(sum(total_N.tolist()) / len(rows), parts.corpus, rows)
