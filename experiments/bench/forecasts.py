"""`expertier bench forecast`: tokens per second and hit rates, predicted before loading and then measured.

Each point is a generated model, a memory budget and a batch. The prediction knows the checkpoint's headers, recorded
routing, and rates of this machine; it is made before the model is loaded. Then `offload.load` runs the same rows.
The gate: every model's router must choose the recorded experts, and on a small model, whose steps all fit, the
misses on paper must be those that the runtime counts.

Shapes: A steps, T tokens, L MoE layers, E experts, B sequences.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import numpy as np
import typer

from routing.ground.expect import expect_folder
from routing.ground.terminal import plain_console

from ..evidence.record import RECORDS, expect_records, save_record
from .listed import listed

if TYPE_CHECKING:
    from offload import StepRates
    from routing.traces import RoutingTrace

# what the project's issue on placement asks of these errors: median, worst, and of hit rates
GOALS = {"median_error": 0.10, "worst_error": 0.25, "hit_rate_error": 0.02}
# the cache fills meanwhile, and the first calls allocate; not counted on either side
WARM_STEPS = 16
# of the least budget and of the one that holds everything; the runtime refuses less and gains nothing from more
SHARES = (0.15, 0.4, 0.7)
POLICY = "learned"
SEED = 0
Result = TypeVar("Result")


@dataclass(frozen=True)
class GeneratedModel:
    """Shape of a replay checkpoint."""

    layers: int
    experts: int
    top_k: int
    hidden: int
    width: int

    @property
    def name(self) -> str:
        return f"{self.layers} x {self.experts}, top-{self.top_k}, {self.hidden} x {self.width}"


# 0.4 to 0.6 GB of experts each, small ones and large ones: reads of 1.6 MB and of 9 MB
MODELS = (
    GeneratedModel(layers=8, experts=32, top_k=4, hidden=512, width=512),
    GeneratedModel(layers=4, experts=16, top_k=2, hidden=2048, width=768),
)
SMALLEST = GeneratedModel(layers=2, experts=8, top_k=2, hidden=128, width=64)  # of the gate


def bench_forecast(
    folder: Annotated[Path, typer.Option(help="Where the generated models go, on the disk to be measured.")],
    hardware: Annotated[Path | None, typer.Option(help="A file of `expertier calibrate`; measured if missing.")] = None,
    batches: Annotated[str, typer.Option(help="Sequences that decode together, with commas between them.")] = "1,4",
    steps: Annotated[int, typer.Option(min=2, help="Decode steps that are timed at each point.")] = 48,
    repeats: Annotated[int, typer.Option(min=1, help="Loads of each point; the one with the median error counts.")] = 3,
    records: Annotated[Path, typer.Option(help="Folder of the record.")] = RECORDS,
) -> None:
    """Predict tokens per second and hit rates at each (budget, model, batch), measure them, tell the errors.

    The machine must be quiet, and the models' folder on its usual disk. Its rates are measured anew before each budget,
    and the disk's before each load, because hosts that others share change within minutes.

    Example: `expertier bench forecast --folder /data/scratch --hardware hardware.toml`
    """
    from offload import measure_step_rates
    from routing.ground.hardware import Hardware

    expect_records(records)
    sizes = listed(batches, "--batches")
    if not folder.is_dir():
        raise ValueError(f"--folder {folder}: no such folder; create it first")
    given = None if hardware is None else Hardware.load(hardware)
    expect_folder(folder / "model")
    console, rows = plain_console(), []
    with tempfile.TemporaryDirectory(dir=folder, prefix="expertier-forecast-") as place:
        _expect_counted_misses(Path(place) / "gate")
        measured = partial(_in_a_process, measure_step_rates, folder, given, sizes)
        for row in _points(Path(place), sizes, steps, repeats, measured):
            rows.append(row)
            console.print(", ".join(f"{key} {_shown(value)}" for key, value in row.items()), highlight=False)
    found = summary(rows)
    for name, value in found.items():
        verdict = "within" if value <= GOALS[name] else "above"
        console.print(f"{name} {value:.3f}, {verdict} the goal of {GOALS[name]}", highlight=False)
    config = {"steps": steps, "repeats": repeats, "warm_steps": WARM_STEPS, "batches": sizes, "shares": SHARES}
    saved = save_record("offload-forecast", rows, config=config | {"policy": POLICY} | found, seed=SEED, folder=records)
    console.print(f"record: {saved}", highlight=False)


def _in_a_process(work: Callable[..., Result], *given: Any) -> Result:
    """What the work gives in a new process: a budget counts what the process holds, and nothing of other points."""
    import multiprocessing

    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *given).result()


def summary(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Median and worst relative error of tokens per second, and the worst of hit rates."""
    errors = [row["error"] for row in rows]
    hits = [abs(row["hit_rate"] - row["hit_rate_predicted"]) for row in rows]
    return {"median_error": median(errors), "worst_error": max(errors), "hit_rate_error": max(hits)}


def _points(
    place: Path, batches: list[int], steps: int, repeats: int, measured: "Callable[[int], StepRates]"
) -> Iterator[dict[str, Any]]:
    context = WARM_STEPS + steps
    for number, shape in enumerate(MODELS):
        checkpoint = place / f"model{number}"
        trace = _build(shape, checkpoint, context * max(batches))
        for share in SHARES:
            rates = measured(shape.hidden)
            for batch in batches:
                given = (checkpoint, trace, share, _lanes(context, batch), rates)
                loads = [_in_a_process(point, *given) for _ in range(repeats)]
                found = sorted(loads, key=lambda load: load["error"])[repeats // 2]
                yield {"model": shape.name, "share": share, "batch": batch, **found, "n": steps}


def point(checkpoint: Path, trace: "RoutingTrace", share: float, row_AT: Any, rates: "StepRates") -> dict[str, Any]:
    """Predict one point from the disk's rate of this moment, then load the model and measure it.

    Args:
        checkpoint: which routes as the trace says.
        trace: recorded routing.
        share: of the way from the least budget to the one that holds everything.
        row_AT: rows of each step, the warm ones first.
        rates: of this machine.
    """
    from offload import disk_bandwidth, fit, forecast_steps

    context = trace.num_tokens
    fit(checkpoint, context=context)  # loads the libraries, which the next one counts as held
    budgets = fit(checkpoint, context=context).budgets
    budget = budgets.least_bytes + int(share * (budgets.all_bytes - budgets.least_bytes))
    fitted = fit(checkpoint, cpu_memory=budget, context=context)
    disk = disk_bandwidth(max(checkpoint.glob("*.safetensors"), key=_size), num_threads=4, read_bytes=4 << 20)
    rates = replace(rates, machine=replace(rates.machine, disk_bytes_per_s=disk))
    held = row_AT.size // 2  # on average, over the steps
    said = forecast_steps(fitted, trace, row_AT, rates, policy=POLICY, warm=WARM_STEPS, held_tokens=held)
    predicted = row_AT.shape[1] / said.step_s
    got = _measure(checkpoint, budget, context, row_AT)
    return {
        "budget_bytes": budget,
        "slots": sum(got["slots"]),
        "slots_predicted": 0 if fitted.plan is None else sum(fitted.plan.num_slots),
        "hit_rate": got["hit_rate"],
        "hit_rate_predicted": said.hit_rate,
        "tokens_per_second": got["tokens_per_second"],
        "tokens_per_second_predicted": predicted,
        "error": abs(predicted / got["tokens_per_second"] - 1),
        "disk_bytes_per_s": disk,
        "exact_bytes_per_s": rates.machine.exact_bytes_per_s,
        "layer_s": rates.machine.layer_s,
        "call_s": rates.call_s[row_AT.shape[1]],
    }


def _size(file: Path) -> int:
    return file.stat().st_size


def _build(shape: GeneratedModel, checkpoint: Path, tokens: int) -> "RoutingTrace":
    """Write a model that routes as a generated trace says, and the trace."""
    from placement import generate_trace

    from ..evidence.replay import ReplaySize, build_replay, check_replay

    sizes = {"layers": shape.layers, "experts": shape.experts, "top_k": shape.top_k}
    trace = generate_trace(tokens=tokens, blocks=4, tokens_per_sequence=64, seed=SEED, **sizes)
    build_replay(trace, checkpoint, ReplaySize(hidden=shape.hidden, expert=shape.width), seed=SEED)
    if (share := check_replay(checkpoint, trace, min(tokens, 256))) < 1:
        raise RuntimeError(f"the generated model chooses the recorded experts in {share:.1%} of the cases only")
    return trace


def _lanes(steps: int, batch: int) -> Any:
    """Rows of each step: `batch` sequences, each the next `steps` rows of the trace. [A, B]."""
    return np.arange(steps * batch).reshape(batch, steps).T


def _measure(checkpoint: Path, budget: int, context: int, row_AT: Any) -> dict[str, Any]:
    """Decode the rows with `offload.load` and count what happened after the warm steps."""
    import transformers

    import offload

    transformers.logging.disable_progress_bar()
    model = offload.load(checkpoint, cpu_memory=budget, context=context, policy=POLICY, io="direct",
                         arithmetic="exact", prefetch="off")  # fmt: skip
    try:
        slots, past = model.offload.num_slots, _decode(model, row_AT[:WARM_STEPS], None)
        model.offload.reset()
        began = time.perf_counter()
        _decode(model, row_AT[WARM_STEPS:], past)
        seconds = time.perf_counter() - began
        report = model.offload.report()
    finally:
        model.offload.close()
    asked = report["hits"] + report["misses"]
    return {
        "slots": slots,
        "hit_rate": report["hits"] / max(asked, 1),
        "tokens_per_second": row_AT[WARM_STEPS:].size / seconds,
    }


def _decode(model: Any, row_AT: Any, past: Any) -> Any:
    """One step after the other: token id i stands for row i of the trace."""
    import torch

    with torch.inference_mode():
        for row_T in row_AT:
            ids_B1 = torch.from_numpy(row_T.astype("int64"))[:, None]
            past = model(ids_B1, past_key_values=past, use_cache=True).past_key_values
    return past


def _expect_counted_misses(checkpoint: Path) -> None:
    """Raise RuntimeError unless the misses on paper are those of the runtime, on a small model whose steps fit."""
    import offload

    row_AT = _lanes(24, 2)
    trace = _build(SMALLEST, checkpoint, row_AT.size)
    model = offload.load(checkpoint, cache_experts=5, policy=POLICY, prefetch="off")
    try:
        _decode(model, row_AT, None)
        counted = [layer.misses for layer in model.offload.runtime.counters.layers]
    finally:
        model.offload.close()
    paper = offload.replay_steps(trace, row_AT, [5] * SMALLEST.layers, POLICY).misses_AL.sum(axis=0).tolist()
    if counted != paper:
        raise RuntimeError(
            f"parity is red, so no error is told: the runtime missed {counted} experts, on paper {paper}"
        )


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
