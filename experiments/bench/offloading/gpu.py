"""The GPU rows of `expertier bench offload`: our tier at several budgets, a plain cache on the same GPU, and the bus.

The plain cache is what single-purpose scripts do: least recently used per layer, each missing expert copied and waited
for before it is computed. It differs from ours in nothing else.
"""

import gc
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from routing.ground.expect import expect_name
from routing.ground.files import write_json
from routing.ground.terminal import plain_console

WARM_UP = 4
"""Tokens decoded before the clock runs: kernels are compiled when they are first launched."""


@dataclass(frozen=True, kw_only=True)
class GpuContestant:
    """How one contestant loads the checkpoint.

    Args:
        arguments: further arguments of `offload.load`.
        waits: whether the host waits for every copy before it goes on.
    """

    arguments: Mapping[str, Any] = field(default_factory=dict)
    waits: bool = False


CONTESTANTS: Mapping[str, GpuContestant] = {
    "ours": GpuContestant(),
    "ours-lru": GpuContestant(arguments={"policy": "lru"}),
    "ours-fast": GpuContestant(arguments={"arithmetic": "fast"}),
    "lru-synchronous": GpuContestant(arguments={"policy": "lru"}, waits=True),
}
KEYS = (
    "gpu_memory", "contestant", "tok_per_s", "median_s", "p20_s", "p80_s", "bound_tok_per_s", "gpu_hit_rate",
    "copied_bytes_per_token", "cpu_experts", "prefill_s", "load_s", "peak_bytes", "note",
)  # fmt: skip


def bench_gpu(
    checkpoint: Path,
    limits: Sequence[str],
    contestants: Sequence[str],
    prefill: int,
    decode: int,
    json_file: Path | None,
    *,
    record: bool,
) -> None:
    """Feed the trace of a replay checkpoint through each contestant at each GPU budget.

    Raises:
        ValueError: if there is no GPU, or a contestant is unknown.
        RuntimeError: if outputs depend on the budget.
    """
    from offload import open_lane, wire_bandwidth

    lane = open_lane("cuda", "auto", None)
    assert lane is not None
    for name in contestants:
        expect_name(name, CONTESTANTS, "contestant")
    check_parity()
    wire, console, results = wire_bandwidth(lane), plain_console(), []
    console.print(f"the bus gives {wire / 1e9:.1f} GB/s from pinned memory", highlight=False)
    try:
        for limit in limits:
            for name in contestants:
                results.append(_run(name, checkpoint, limit, prefill, decode, wire))
                console.print(" ".join(str(results[-1][key]) for key in KEYS), highlight=False)
    except KeyboardInterrupt:
        if not results:
            raise
        console.print("interrupted; what was measured follows")
    _print(console, results)
    if json_file:
        write_json(json_file, results)
    if record:
        from ...evidence.record import save_record

        save_record("bench-offload-gpu", results, config={"prefill": prefill, "decode": decode, "pcie": wire})


def check_parity() -> None:
    """Few slots must give the bits of all slots, before anything is timed.

    Raises:
        RuntimeError: if they do not.
    """
    import numpy as np
    import torch

    import offload
    from routing.traces import RoutingTrace

    from ...evidence.replay import ReplaySize, build_replay

    rng = np.random.default_rng(0)
    expert_TLK = np.stack([[rng.permutation(16)[:4] for _ in range(3)] for _ in range(40)]).astype(np.int16)
    trace = RoutingTrace(expert_TLK=expert_TLK, sequence_T=np.zeros(40, np.int32), metadata={"num_experts": 16})
    outputs = []
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        build_replay(trace, Path(folder), ReplaySize(hidden=128, expert=64))
        for gpu_experts in (16, 5, 2):
            model = offload.load(folder, device="cuda", gpu_experts=gpu_experts, cache_experts=16)
            outputs.append(replay(model, 16, 16)[2])
            model.offload.close()
    if not all(torch.equal(output, outputs[0]) for output in outputs):
        raise RuntimeError("the number of GPU slots changes the output; nothing is measured")


def replay(model: Any, prefill: int, decode: int) -> tuple[float, list[float], Any]:
    """Seconds of the first call and of each decoded token after the warm-up, and the logits of all decoded tokens."""
    import torch

    ids, step_s, logits = torch.arange(prefill + WARM_UP + decode, device=model.device)[None], [], []
    with torch.inference_mode():
        started = time.perf_counter()
        output = model(ids[:, :prefill], use_cache=True, logits_to_keep=1)
        output.logits.cpu()
        prefill_s = time.perf_counter() - started
        for position in range(prefill, prefill + WARM_UP + decode):
            if position == prefill + WARM_UP:
                step_s.clear()
                model.offload.reset()
            started = time.perf_counter()
            output = model(ids[:, position : position + 1], past_key_values=output.past_key_values, use_cache=True)
            logits.append(output.logits.cpu())
            step_s.append(time.perf_counter() - started)
    return prefill_s, step_s, torch.cat(logits)


def _run(name: str, checkpoint: Path, limit: str, prefill: int, decode: int, wire: float) -> dict[str, Any]:
    row: dict[str, Any] = {**dict.fromkeys(KEYS), "gpu_memory": limit, "contestant": name, "note": ""}
    try:
        measured = _measure(name, checkpoint, limit, prefill, decode)
    except (RuntimeError, ValueError, OSError) as error:
        return {**row, "note": str(error).splitlines()[0][:160]}
    missed = measured["copied_bytes_per_token"]
    return {**row, **measured, "bound_tok_per_s": wire / missed if missed else None}


def _measure(name: str, checkpoint: Path, limit: str, prefill: int, decode: int) -> dict[str, Any]:
    import torch

    import offload

    row, started = CONTESTANTS[name], time.perf_counter()
    model = offload.load(
        checkpoint, device="cuda", gpu_memory=limit, context=prefill + WARM_UP + decode, **row.arguments
    )
    try:
        if row.waits:
            _wait_for_every_copy(model)
        load_s = time.perf_counter() - started
        prefill_s, step_s, _ = replay(model, prefill, decode)
        report, ordered = model.offload.report(), sorted(step_s)
    finally:
        model.offload.close()
        del model
        gc.collect()
        torch.cuda.empty_cache()
    gpu = report["gpu"]
    return {
        "tok_per_s": decode / sum(step_s),
        "median_s": median(ordered),
        "p20_s": ordered[decode // 5],
        "p80_s": ordered[decode * 4 // 5],
        "gpu_hit_rate": gpu["hit_rate"],
        "copied_bytes_per_token": gpu["copied_bytes"] / decode,
        "cpu_experts": gpu["cpu_experts"],
        "prefill_s": prefill_s,
        "load_s": load_s,
        "peak_bytes": gpu["peak_memory_bytes"],
    }


def _wait_for_every_copy(model: Any) -> None:
    """Turn the tier into the plain cache: the host waits for each copy before it goes on."""
    lane = model.offload.lane
    copy_in = lane.copy_in

    def copy_and_wait(pairs: Any, after: Any) -> Any:
        copy = copy_in(pairs, after)
        copy.wait()
        return copy

    lane.copy_in = copy_and_wait


def _print(console: Console, results: Sequence[Mapping[str, Any]]) -> None:
    shown = [key for key in KEYS if key != "note"]
    table = Table(*shown)
    for row in results:
        table.add_row(*(f"{row[key]:.4g}" if isinstance(row[key], float) else str(row[key]) for key in shown))
    console.print(table)
