"""`expertier bench finetune`: seconds of a step beside the seconds that its bytes take on this disk.

Every contestant runs in a process of its own under a memory limit, on a replay checkpoint whose files the page cache
has forgotten. Its bound is the time of its reads and its writes, one after the other, at the rates that the disk was
measured at before. Bytes are the smaller of the kernel's count and the contestant's own: what the page cache gave
cost nothing, and what was read in vain is no excuse.
"""

import json
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from rich.table import Table

from offload import format_size, parse_size
from routing.ground.expect import expect_name, expect_outputs, expect_there
from routing.ground.files import write_json
from routing.ground.terminal import plain_console

from ...evidence.memory_limit import drop_cached, run_limited
from ...evidence.record import RECORDS, expect_records, save_record
from ..offloading.bench import ensure_checkpoint, read_bandwidth
from .work import Work
from .write_rate import write_bandwidth

METHODS = ("zo", "lora", "full")
NAMES = (*METHODS, "accelerate")
COLUMNS = (
    *("step_s", "p20_s", "p80_s", "tok_per_s", "bytes_read", "bytes_written"),
    *("bound_s", "share_of_bound", "commit_s", "last_loss"),
)
TIMEOUT_S = 7200.0
"""For one contestant: full fine-tuning of 7 G parameters moves some 200 GB per step."""


def bench_finetune(
    checkpoint: Annotated[Path, typer.Argument(help="A replay checkpoint; made from --trace if it is not there.")],
    trace: Annotated[Path | None, typer.Option("--trace", help="The trace to build it from.")] = None,
    rows: Annotated[int, typer.Option("--rows", help="Rows of the trace to build in.")] = 20480,
    form: Annotated[str, typer.Option("--form", help="How its experts are stored: plain, fp8, int4, mxfp4.")] = "plain",
    contestant: Annotated[
        list[str] | None, typer.Option("--contestant", help=f"{', '.join(NAMES)}; repeat for more.")
    ] = None,
    limit: Annotated[str, typer.Option("--limit", help="Memory limit of each, or none.")] = "4GiB",
    steps: Annotated[int, typer.Option("--steps", min=2, help="Steps of each; the first one is not counted.")] = 4,
    sequence_length: Annotated[int, typer.Option("--sequence-length", min=2, help="Tokens of a row.")] = 256,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Rows of a micro-batch.")] = 1,
    accumulation: Annotated[int, typer.Option("--accumulation", min=1, help="Micro-batches of a step.")] = 4,
    rank: Annotated[int, typer.Option("--rank", min=1, help="Of adapters.")] = 2,
    activation_memory: Annotated[
        str, typer.Option("--activation-memory", help="Activations of all micro-batches in memory; not for zo.")
    ] = "512MiB",
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the table as JSON.")] = None,
    record: Annotated[bool, typer.Option("--record", help="Keep the result under experiments/records.")] = False,
    records: Annotated[Path, typer.Option(help="Where records live.")] = RECORDS,
) -> None:
    """Time steps of fine-tuning under a memory limit, and compare them with what their bytes take on this disk.

    accelerate with PEFT keeps the model on the disk, too; where they are not installed, its row says so.

    Example: `expertier bench finetune /tmp/replay --trace routing.npz --limit 4GiB --contestant lora`
    """
    # here, because it builds a checkpoint, and `expertier --help` does without torch
    from .parity import check_parity

    names = contestant or list(METHODS if form == "plain" else ("lora",))
    for name in names:
        expect_name(name, NAMES, "contestant")
        if form != "plain" and name != "lora":
            raise ValueError(f"{name} cannot train experts as {form}; lora can")
    if limit != "none":
        parse_size(limit)
    parse_size(activation_memory)
    expect_outputs(json_file, inputs=[checkpoint, trace])
    expect_there(trace if trace is not None else checkpoint)
    expect_records(records)
    check_parity([name for name in names if name in METHODS])
    ensure_checkpoint(checkpoint, trace, rows, form)
    work = Work(
        checkpoint=str(checkpoint),
        limit=limit,
        steps=steps,
        sequence_length=sequence_length,
        batch_size=batch_size,
        accumulation=accumulation,
        rank=rank,
        activation_memory=activation_memory,
    )
    rates = {"read": read_bandwidth(checkpoint), "write": write_bandwidth(checkpoint.parent)}
    console = plain_console()
    console.print(
        f"the disk reads {rates['read'] / 1e9:.2f} GB/s, writes {rates['write'] / 1e9:.2f} GB/s", highlight=False
    )
    found = [_row(name, work, rates) for name in names]
    console.print(_table(found))
    if json_file:
        write_json(json_file, found)
    if record:
        config = asdict(work) | {"form": form, "bytes_per_s": rates}
        typer.echo(f"record: {save_record('bench-finetune', found, config=config, seed=0, folder=records)}")


def _row(name: str, work: Work, rates: dict[str, float]) -> dict[str, Any]:
    """One contestant's step: seconds, bytes, bound; the note says why there is none."""
    checkpoint = Path(work.checkpoint)
    drop_cached(checkpoint)
    with tempfile.TemporaryDirectory(dir=checkpoint.parent, prefix="expertier-bench-") as scratch:
        argument = json.dumps(asdict(replace(work, scratch=scratch)))
        program = [sys.executable, "-m", "experiments.bench.tuning.contestants", name, argument]
        done = run_limited(program, None if work.limit == "none" else parse_size(work.limit), TIMEOUT_S)
    row = {"contestant": name, "limit": work.limit, "tokens": work.tokens, "peak_bytes": done.peak_bytes}
    if done.returncode == 0:
        return row | step_row(json.loads(done.stdout.strip().splitlines()[-1]), rates, work.tokens) | {"note": ""}
    reason = (done.stderr.strip().splitlines() or ["no message; the kernel ends what exceeds the limit"])[-1]
    return row | dict.fromkeys(COLUMNS) | {"note": f"exit {done.returncode}: {reason}"[:160]}


def step_row(measured: dict[str, Any], rates: dict[str, float], tokens: int) -> dict[str, Any]:
    """What a contestant's steps come to, the first one left out.

    Args:
        measured: `steps` with seconds and bytes, and `commit_s`, which all steps share.
        rates: bytes per second of `read` and `write`.
        tokens: of one step.
    """
    steps = measured["steps"][1:]
    share_s = measured["commit_s"] / (len(steps) + 1)
    seconds = sorted(step["seconds"] + share_s for step in steps)
    step_s = median(seconds)
    moved = {name: median(_fewest(step, name) for step in steps) for name in ("read", "written")}
    bound_s = moved["read"] / rates["read"] + moved["written"] / rates["write"]
    values = (
        step_s,
        seconds[len(seconds) // 5],
        seconds[len(seconds) * 4 // 5],
        tokens / step_s,
        moved["read"],
        moved["written"],
        bound_s,
        bound_s / step_s,
        measured["commit_s"],
        steps[-1]["loss"],
    )
    return dict(zip(COLUMNS, values, strict=True))


def _fewest(step: dict[str, Any], name: str) -> int:
    """Bytes by the smaller of both counts; accelerate counts none."""
    own: int | None = step[f"bytes_{name}"]
    kernel: int = step[f"kernel_{name}"]
    return kernel if own is None else min(kernel, own)


def _table(found: list[dict[str, Any]]) -> Table:
    table = Table("contestant", "step s", "p20", "p80", "tok/s", "read", "written", "bound s", "of the bound", "peak")
    for row in found:
        if row["note"]:
            table.add_row(row["contestant"], row["note"])
            continue
        numbers = [f"{row[name]:.3f}" for name in ("step_s", "p20_s", "p80_s", "tok_per_s")]
        sizes = [format_size(int(row[name])) for name in ("bytes_read", "bytes_written")]
        peak = "-" if row["peak_bytes"] is None else format_size(row["peak_bytes"])
        share = f"{row['share_of_bound']:.0%}"
        table.add_row(row["contestant"], *numbers, *sizes, f"{row['bound_s']:.3f}", share, peak)
    return table
