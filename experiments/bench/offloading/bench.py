"""`expertier bench offload`: decode speed of several engines on one replay checkpoint under the same memory limit."""

import json
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from offload import format_size, parse_size
from routing.ground.expect import expect_outputs, expect_there
from routing.ground.files import write_json
from routing.ground.terminal import plain_console

from ...evidence.memory_limit import drop_cached, run_limited
from .catalogue import CONTESTANTS, check_contestants, defaults_of, find_contestant

# For one contestant at one limit. accelerate, at 0.23 tokens/s in the records, needs 210 s for the default 48 tokens;
# the rest is room for loading, for more tokens and for slower disks.
TIMEOUT_S = 1800.0
DEFAULT_LIMITS = ("6GiB", "4GiB", "none")

CheckpointArgument = Annotated[Path, typer.Argument(help="A replay checkpoint; made from --trace if it is not there.")]
TraceOption = Annotated[Path | None, typer.Option("--trace", help="The trace to build it from.")]
RowsOption = Annotated[int, typer.Option("--rows", help="Rows of the trace to build in.")]
FormOption = Annotated[str, typer.Option("--form", help="How its experts are stored: plain, fp8, int4, mxfp4.")]
LimitOption = Annotated[list[str] | None, typer.Option("--limit", help="Memory limit, or none; repeat for more.")]
ContestantOption = Annotated[list[str] | None, typer.Option("--contestant", help="Who runs; repeat for more.")]
PrefillOption = Annotated[int, typer.Option("--prefill", min=1, help="Tokens of the first call.")]
DecodeOption = Annotated[int, typer.Option("--decode", min=2, help="Tokens decoded one by one.")]
PredictorOption = Annotated[Path | None, typer.Option("--predictor", help="From other rows, for ours-ahead.")]
DeviceOption = Annotated[str, typer.Option("--device", help="cpu; or cuda, where limits are GPU budgets.")]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Also write the table as JSON.")]
RecordOption = Annotated[bool, typer.Option("--record", help="Save a record.")]


def bench_offload(
    checkpoint: CheckpointArgument,
    trace: TraceOption = None,
    rows: RowsOption = 20480,
    form: FormOption = "plain",
    limit: LimitOption = None,
    contestant: ContestantOption = None,
    prefill: PrefillOption = 64,
    decode: DecodeOption = 48,
    predictor: PredictorOption = None,
    device: DeviceOption = "cpu",
    json_file: JsonOption = None,
    record: RecordOption = False,
) -> None:
    """Feed a recorded trace through each engine under a memory limit, and print tokens per second.

    Example: `expertier bench offload /tmp/replay --trace routing.npz --limit 6GiB --limit none`

    Stored codes, with gpt-oss-20b's shapes: `expertier bench offload /tmp/gpt-oss --trace routing.npz --form mxfp4`

    On a GPU: `expertier bench offload /tmp/replay --trace routing.npz --device cuda --limit 8GiB --limit 4GiB`
    """
    expect_outputs(json_file, inputs=[checkpoint, trace, predictor])
    expect_there(trace if trace is not None else checkpoint, predictor)
    if device != "cpu":
        _bench_gpu(checkpoint, trace, rows, form, device, limit, contestant, prefill, decode, json_file, record)
        return
    contestants = tuple(contestant or defaults_of(form))
    check_contestants(contestants, predictor, form)
    check_parity(form)
    ensure_checkpoint(checkpoint, trace, rows, form)
    bandwidth, console, results = read_bandwidth(checkpoint), plain_console(), []
    console.print(f"the disk gives {bandwidth / 1e9:.2f} GB/s to 4 threads, 4 MiB a read, O_DIRECT", highlight=False)
    for text in limit or DEFAULT_LIMITS:
        for name in contestants:
            if not CONTESTANTS[name].runs_under(text):
                continue
            result = run_contestant(name, checkpoint, text, prefill, decode, predictor)
            results.append({**result, "bound_tok_per_s": _bound(result, bandwidth)})
            console.print(_line(results[-1]), highlight=False)
    _print(console, results)
    if json_file:
        write_json(json_file, results)
    if record:
        from ...evidence.record import save_record

        save_record(
            "bench-offload",
            results,
            config={"form": form, "prefill": prefill, "decode": decode, "read_bytes_per_s": bandwidth},
        )


def _bench_gpu(
    checkpoint: Path,
    trace: Path | None,
    rows: int,
    form: str,
    device: str,
    limit: list[str] | None,
    contestant: list[str] | None,
    prefill: int,
    decode: int,
    json_file: Path | None,
    record: bool,
) -> None:
    from offload import open_lane

    from .gpu import CONTESTANTS, bench_gpu

    open_lane(device, "auto", None)
    ensure_checkpoint(checkpoint, trace, rows, form)
    limits, contestants = limit or ["8GiB", "4GiB"], contestant or list(CONTESTANTS)
    bench_gpu(checkpoint, limits, contestants, prefill, decode, json_file, record=record)


def check_parity(form: str = "plain") -> None:
    """Offloaded logits must be the resident model's, bit by bit, on a small replay, before anything is timed.

    Args:
        form: how its experts are stored; the resident model of codes is the dequantised one.

    Raises:
        RuntimeError: if they are not.
    """
    import numpy as np
    import torch

    import offload
    from routing.traces import RoutingTrace

    from ...evidence.replay import ReplaySize, build_replay, usual_size
    from .contestants import copy_of, load_model

    rng = np.random.default_rng(0)
    expert_TLK = np.stack([[rng.permutation(16)[:4] for _ in range(3)] for _ in range(40)]).astype(np.int16)
    trace = RoutingTrace(expert_TLK=expert_TLK, sequence_T=np.zeros(40, np.int32), metadata={"num_experts": 16})
    tokens = torch.arange(40)[None]
    with tempfile.TemporaryDirectory() as temporary, torch.inference_mode():
        folder, plain = Path(temporary, "stored"), Path(temporary, "plain")
        build_replay(trace, folder, ReplaySize(hidden=128, expert=64, form=usual_size(form).form))
        if form != "plain":
            offload.dequantise(folder, plain)
        resident = load_model("resident", folder if form == "plain" else plain, "none", 40)
        resident(tokens)  # torch's first call in a process now and then differs in last bits from all later ones
        expected = resident(tokens).logits
        pack = copy_of(folder, "compressed") if form == "plain" else None
        for cache_experts, copy in ((2, None), (5, pack), (16, None)):
            model = offload.load(folder, cache_experts=cache_experts, pack=copy)
            if not torch.equal(model(tokens).logits, expected):
                raise RuntimeError(f"{cache_experts} slots per layer change the output; nothing is measured")
            model.offload.close()


def run_contestant(
    name: str, checkpoint: Path, limit: str, prefill: int, decode: int, predictor: Path | None
) -> dict[str, Any]:
    """One row of the table: what a contestant does in a process of its own under a limit."""
    row = find_contestant(name)
    told: dict[str, Any] = {"contestant": name, "limit": limit}
    if row.engine == "llama.cpp":
        note, can_run = _prepare_llama_cpp(checkpoint)
        told["note"] = note
        if not can_run:
            return _row(told, {}, None)
    if row.copy:
        from .contestants import copy_of

        copy_of(checkpoint, row.copy)
        if row.copy != "compressed":
            told["note"] = f"lossy: experts as {row.copy} by hqq"
    drop_cached(checkpoint)
    limit_bytes = None if limit == "none" else parse_size(limit)
    program = [sys.executable, "-m", "experiments.bench.offloading.contestants"]
    arguments = [name, str(checkpoint), limit, str(prefill), str(decode), str(predictor or "")]
    finished = run_limited([*program, *arguments], limit_bytes, TIMEOUT_S)
    measured: dict[str, Any] = {}
    if finished.returncode == 0:
        measured = json.loads(finished.stdout.strip().splitlines()[-1])
    else:
        reason = (finished.stderr.strip().splitlines() or ["no message"])[-1]
        told["note"] = f"exit {finished.returncode}: {reason}"[:160]
    return _row(told, measured, finished.peak_bytes)


def _prepare_llama_cpp(checkpoint: Path) -> tuple[str, bool]:
    """What has to be said of llama.cpp on a checkpoint, and whether it can run; its file is there then."""
    from ...evidence.replay import form_of
    from . import gguf_file, llama_cpp

    form = form_of(checkpoint)
    note = gguf_file.NOTES.get(form, "")
    if form not in gguf_file.TYPES:
        return note, False
    if not llama_cpp.is_available():
        return llama_cpp.NOT_INSTALLED, False
    gguf_file.gguf_of(checkpoint)
    return note, True


def _row(row: dict[str, Any], measured: dict[str, Any], peak_bytes: int | None) -> dict[str, Any]:
    step_s = measured.get("step_s", [])
    ordered = sorted(step_s)
    return {
        **row,
        "tok_per_s": len(step_s) / sum(step_s) if step_s else None,
        "median_s": median(ordered) if ordered else None,
        "p20_s": ordered[len(ordered) // 5] if ordered else None,
        "p80_s": ordered[len(ordered) * 4 // 5] if ordered else None,
        "prefill_s": measured.get("prefill_s"),
        "prefill_again_s": measured.get("prefill_again_s"),
        "load_s": measured.get("load_s"),
        "hit_rate": measured.get("hit_rate"),
        "bytes_per_token": measured.get("bytes_per_token"),
        "bytes_missed_per_token": measured.get("bytes_missed_per_token"),
        "prefill_bytes": measured.get("prefill_bytes"),
        "io_and_compute_share": measured.get("io_and_compute_share"),
        "prefetch": measured.get("prefetch"),
        "peak_bytes": peak_bytes,
        "peak_rss_bytes": measured.get("peak_rss_bytes"),
        "logits": measured.get("logits"),
        "note": row.get("note", ""),
    }


def _bound(result: dict[str, Any], bandwidth: float) -> float | None:
    missed = result["bytes_missed_per_token"]
    return bandwidth / missed if missed else None


def ensure_checkpoint(checkpoint: Path, trace: Path | None, rows: int, form: str) -> None:
    """Build a replay checkpoint where there is none, and check that it routes as recorded.

    Args:
        checkpoint: its folder.
        trace: to build it from, or to check it against; None for a checkpoint that is there.
        rows: how many of the trace are built in, from its first on.
        form: how its experts are stored.

    Raises:
        ValueError: if it cannot be built, or is of another form or trace.
    """
    from routing.traces import RoutingTrace

    from ...evidence.replay import build_replay, check_replay, form_of, usual_size

    if not (checkpoint / "model.safetensors.index.json").is_file():
        if trace is None:
            raise ValueError(f"{checkpoint} is not there; give --trace to build it")
        build_replay(RoutingTrace.load(trace).rows(0, rows), checkpoint, usual_size(form))
    if form_of(checkpoint) != form:
        raise ValueError(f"{checkpoint} has experts as {form_of(checkpoint)}, not as {form}; name another folder")
    if trace is not None:
        share = check_replay(checkpoint, RoutingTrace.load(trace).rows(0, rows), 1000)
        if share < 1:
            raise ValueError(f"{checkpoint} routes only {share:.2%} of the experts as recorded; build it again")


def read_bandwidth(checkpoint: Path) -> float:
    """Bytes per second that 4 threads read of a checkpoint's largest file, 4 MiB at a time, past the page cache."""
    from offload import disk_bandwidth

    drop_cached(checkpoint)
    files = sorted(checkpoint.glob("*.safetensors"), key=lambda file: file.stat().st_size)
    return disk_bandwidth(files[-1], num_threads=4, read_bytes=4 << 20)


def _line(result: dict[str, Any]) -> str:
    speed = "failed" if result["tok_per_s"] is None else f"{result['tok_per_s']:.3f} tok/s"
    return f"{result['limit']:>6}  {result['contestant']:<15} {speed}  {result['note']}"


def _print(console: Console, results: list[dict[str, Any]]) -> None:
    table = Table(
        "limit", "contestant", "tok/s", "median s", "p20", "p80", "bound", "hit rate", "prefill s", "again", "peak"
    )
    for row in results:
        numbers = [row[key] for key in ("tok_per_s", "median_s", "p20_s", "p80_s", "bound_tok_per_s", "hit_rate")]
        shown = [
            "-" if number is None else f"{number:.3f}"
            for number in [*numbers, row["prefill_s"], row["prefill_again_s"]]
        ]
        peak = "-" if row["peak_bytes"] is None else format_size(row["peak_bytes"])
        table.add_row(row["limit"], row["contestant"], *shown, peak)
    console.print(table)
