"""`expertier bench load`: what loading a checkpoint of any size takes beside its slots, from holes instead of weights.

Loading reads headers, finds each expert's place and checks that nothing is missing; it reads no expert. So a checkpoint
of holes takes what a real one of as many tensors does. Where experts lie is checked on a small one before.
"""

import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from routing.ground.expect import expect_choice, expect_folder, expect_outputs
from routing.ground.files import write_json
from routing.ground.quantity import format_size, parse_size
from routing.ground.terminal import plain_console

from ...evidence.generated import save_generated
from ...evidence.record import RECORDS, expect_records, save_record
from .in_process import TEMPORARY, measured

FORMS = ("fp8", "plain")
SHARD_BYTES = 5 * 10**9
"""Of published checkpoints."""
HIDDEN = 2048  # as of small published mixtures; wider ones have fewer experts in as many bytes
GOALS = {"cpu_s": 10.0, "beside_bytes": 300e6}
"""What the project's issue on real checkpoints asks for 1,000 GB."""


def bench_load(
    size: Annotated[str, typer.Option(help="Of all weights.")] = "1000GB",
    form: Annotated[str, typer.Option(help=f"How matrices are stored: {', '.join(FORMS)}.")] = "fp8",
    layers: Annotated[int, typer.Option(min=1, help="Layers with experts.")] = 16,
    experts: Annotated[int, typer.Option(min=2, help="Experts of a layer.")] = 1024,
    repeats: Annotated[int, typer.Option(min=1, help="Loads, each in a new process.")] = 3,
    folder: Annotated[Path, typer.Option(help="Where the files go for a while.")] = TEMPORARY,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the rows as JSON.")] = None,
    record: Annotated[bool, typer.Option("--record", help="Keep the rows under experiments/records.")] = False,
    records: Annotated[Path, typer.Option(help="Where records live.")] = RECORDS,
) -> None:
    """Load a checkpoint of holes: seconds of the processor, and memory beside slots and resident weights.

    Example: `expertier bench load --size 1000GB --form fp8`
    """
    expect_choice(form, FORMS, "form")
    expect_outputs(json_file, inputs=[])
    expect_records(records)
    expect_folder(folder / "model")
    config = config_of(parse_size(size), form, layers, experts)
    from ..offloading.bench import check_parity

    check_parity(form)
    console, rows = plain_console(), []
    with tempfile.TemporaryDirectory(dir=folder, prefix="expertier-load-") as place:
        written = save_generated(Path(place), config, SHARD_BYTES)
        for repeat in range(repeats):
            row = {"form": form, "repeat": repeat, **written._asdict(), **measured("loading", checkpoint=place)}
            rows.append(row)
            console.print(
                f"{written.nbytes / 1e9:,.0f} GB in {written.shards} shards, {written.tensors:,} tensors: "
                f"{row['cpu_s']:.1f} s of the processor, {row['wall_s']:.1f} s, "
                f"{row['beside_bytes'] / 1e6:.0f} MB ({format_size(row['beside_bytes'])}) beside slots and weights",
                highlight=False,
            )
    if json_file:
        write_json(json_file, rows)
    if record:
        kept = {"layers": layers, "experts": experts, "shard_bytes": SHARD_BYTES, "goals": GOALS}
        typer.echo(f"record: {save_record('bench-load', rows, config=kept, folder=records)}")


def config_of(nbytes: int, form: str, layers: int, experts: int) -> dict[str, Any]:
    """A mixture whose experts have so many bytes, and little else.

    Raises:
        ValueError: if an expert would have no unit.
    """
    item_bytes = 1 if form == "fp8" else 2
    width = nbytes // (layers * experts * 3 * HIDDEN * item_bytes)
    if width < 1:
        raise ValueError(f"{format_size(nbytes)} are too few for {layers} x {experts} experts of {HIDDEN} columns")
    sizes = {"hidden_size": HIDDEN, "num_hidden_layers": layers, "num_attention_heads": 8, "num_key_value_heads": 2}
    sizes |= {"head_dim": 64, "vocab_size": 1000, "max_position_embeddings": 256}
    sizes |= {"num_experts": experts, "num_experts_per_tok": 1, "moe_intermediate_size": width}
    described: dict[str, Any] = {"model_type": "qwen3_moe", "dtype": "bfloat16", **sizes}
    if form == "fp8":
        described["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    return described


def measure(checkpoint: str) -> dict[str, float]:
    """Load a checkpoint with one slot per layer; libraries are imported before the clock runs."""
    import transformers.models.qwen3_moe.modeling_qwen3_moe  # noqa: F401

    import offload

    assert callable(offload.load)
    before, started, began = _memory("VmRSS"), time.process_time(), time.perf_counter()
    held = offload.load(checkpoint, cache_experts=1).offload.report()["memory"]
    found = {"cpu_s": time.process_time() - started, "wall_s": time.perf_counter() - began}
    beside = _memory("VmHWM") - before - held["slot_bytes"] - held["weight_bytes"]
    return {**found, "beside_bytes": beside, "slot_bytes": held["slot_bytes"], "weight_bytes": held["weight_bytes"]}


def _memory(name: str) -> int:
    """Bytes that this process has (VmRSS), or has had at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:"))
