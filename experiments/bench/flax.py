"""`expertier bench flax`: the forms of grouped products in JAX, and the JAX trainer beside the torch trainer."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import typer
from rich.table import Table

from routing.ground.terminal import plain_console

from ..evidence.record import RECORDS, expect_records, save_record
from ..train.presets import TrainConfig, preset

# experts, rows, model width, expert width: many small groups, few large ones, and 16 experts on a large batch
SIZES = {"fine": (64, 1024, 256, 512), "coarse": (8, 1024, 256, 512), "e16": (16, 8192, 256, 512)}
# relative norm of the difference of two float32 products with sums in different orders
TOLERANCE = 1e-5


def bench_flax(
    samples: Annotated[int, typer.Option(min=3, help="Calls per product.")] = 15,
    steps: Annotated[int, typer.Option(min=0, help="Training steps per backend; 0 leaves training out.")] = 6,
    preset_name: Annotated[str, typer.Option("--preset", help="Of the training steps.")] = "e16",
    records: Annotated[Path, typer.Option(help="Folder of the record.")] = RECORDS,
) -> None:
    """Time block against ragged products and JAX against torch training steps, in turns; parity is checked first.

    Example: `expertier bench flax --samples 15 --steps 6`
    """
    expect_records(records)
    config = replace(preset(preset_name), precision="float32")
    rows = [row for case, sizes in SIZES.items() for row in _product_rows(case, sizes, samples)]
    if steps:
        rows += _training_rows(preset_name, config, steps)
    _show(rows)
    made = {"samples": samples, "steps": steps, "preset": preset_name, "precision": "float32"}
    typer.echo(f"record: {save_record('flax-twin', rows, config=made, seed=0, folder=records)}")


def _product_rows(case: str, sizes: tuple[int, int, int, int], samples: int) -> list[dict[str, Any]]:
    from moe.nnx.parts.probe import grouped_product_calls

    calls = grouped_product_calls(*sizes)
    for what in ("forward", "gradient"):
        for ours, theirs in zip(calls["block"][what](), calls["ragged"][what](), strict=True):
            error = float(np.linalg.norm(np.subtract(ours, theirs)) / np.linalg.norm(theirs))
            if error > TOLERANCE:
                raise RuntimeError(f"{case} {what}: block and ragged differ by {error:.1e}; no time is reported")
    rows = []
    for what in ("forward", "gradient"):
        times = _in_turns({name: calls[name][what] for name in calls}, samples)
        faster = float(np.median(times["ragged"]) / np.median(times["block"]))
        for name in calls:
            rows.append(_row(f"{case} {what}", name, "ms", 1e3 * times[name], faster))
    return rows


def _training_rows(name: str, config: TrainConfig, steps: int) -> list[dict[str, Any]]:
    """Tokens per second of both trainers on one corpus, from the same weights, whose first losses must agree."""
    import torch

    from ..train import jax_run as train_jax
    from ..train import torch_run as train
    from ..train.corpus import load_corpus

    corpus = load_corpus(None)
    model, optimizer, order = train.build(config, corpus, torch.device("cpu"))
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        run = train_jax.build(config, corpus, Path(folder), weights=Path(folder))
    number = {"torch": 0, "jax": 0}
    lm_losses: dict[str, list[float]] = {"torch": [], "jax": []}

    def step(backend: str) -> None:
        here = number[backend]
        row = run.step(here) if backend == "jax" else train.train_step(model, optimizer, order, config, here)
        lm_losses[backend].append(row["lm_loss"])
        number[backend] = here + 1

    calls = {backend: lambda backend=backend: step(backend) for backend in number}
    times = _in_turns(calls, steps)
    apart = float(np.abs(np.subtract(lm_losses["torch"], lm_losses["jax"])).max())
    if apart > 1e-3:
        raise RuntimeError(f"the trainers' losses are {apart:.1e} nats apart; no time is reported")
    tokens = config.batch_size * config.accumulation * config.sequence_length
    faster = float(np.median(times["torch"]) / np.median(times["jax"]))
    return [_row(f"{name} training", backend, "tokens/s", tokens / times[backend], faster) for backend in times]


def _in_turns(calls: dict[str, Callable[[], Any]], samples: int) -> dict[str, np.ndarray]:
    """Seconds per call, after one warm-up each; taking turns, so that a busy machine disturbs all alike."""
    for call in calls.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(samples):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {name: np.array(values) for name, values in seconds.items()}


def _row(case: str, variant: str, unit: str, values: np.ndarray, faster: float) -> dict[str, Any]:
    p20, p50, p80 = np.percentile(values, [20, 50, 80])
    return {
        "case": case,
        "variant": variant,
        "unit": unit,
        "p20": round(float(p20), 3),
        "p50": round(float(p50), 3),
        "p80": round(float(p80), 3),
        "n": len(values),
        "ours_over_theirs": round(faster, 2),
    }


def _show(rows: list[dict[str, Any]]) -> None:
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*map(str, row.values()))
    plain_console().print(table)
