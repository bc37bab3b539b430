"""`expertier bench streamed`: models whose layers do not fit, against the longer of disk and processor.

A token of a dense model needs every weight. What memory does not hold comes from the disk for each token, while layers
compute; so a step takes at least the longer of both. The same steps with all weights in memory say what computing
takes, and their logits must be the same bits.
"""

import tempfile
import time
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from routing.ground.expect import expect_choice, expect_folder, expect_outputs
from routing.ground.files import write_json
from routing.ground.quantity import format_size, parse_size
from routing.ground.terminal import plain_console

from ...evidence.generated import checkpoint_bytes, save_generated
from ...evidence.memory_limit import drop_cached
from ...evidence.record import RECORDS, expect_records, save_record
from .in_process import measured

SHARD_BYTES = 1 << 30  # a few shards of each model, as published ones have
HEAD_WIDTH, SHARED_HEADS, VOCABULARY = 128, 4, 32000
"""As in models of 7 billion parameters and more: four heads of queries share one of keys."""
GOALS = {"dense": 0.85, "experts": 0.80}
"""Share of the bound that the project's issue on offloading systems asks for."""
SEED = 0  # of weights


def _llama(hidden: int, layers: int, vocabulary: int) -> dict[str, Any]:
    return _common(hidden, layers, vocabulary) | {"model_type": "llama", "intermediate_size": 11 * hidden // 4}


def _mixture(hidden: int, layers: int, vocabulary: int) -> dict[str, Any]:
    """Experts take about what attention takes, so that both are more than a small budget holds."""
    described = _common(hidden, layers, vocabulary) | {"model_type": "qwen3_moe", "num_experts": 8}
    return described | {"num_experts_per_tok": 2, "moe_intermediate_size": hidden // 8}


KINDS: Mapping[str, Callable[[int, int, int], dict[str, Any]]] = {"dense": _llama, "experts": _mixture}


def _common(hidden: int, layers: int, vocabulary: int) -> dict[str, Any]:
    heads = max(hidden // HEAD_WIDTH, 1)
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "vocab_size": vocabulary, "head_dim": HEAD_WIDTH}
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": max(heads // SHARED_HEADS, 1)}
    return {**sizes, "max_position_embeddings": 4096, "dtype": "bfloat16", "tie_word_embeddings": False}


def bench_streamed(
    folder: Annotated[Path, typer.Option(help="Where the generated model goes, on the disk to be measured.")],
    kind: Annotated[str, typer.Option(help=f"Of model: {', '.join(KINDS)}.")] = "dense",
    size: Annotated[str, typer.Option(help="Of all its weights.")] = "6GB",
    limit: Annotated[str, typer.Option(help="Of the process's memory control group, or none.")] = "3GiB",
    memory: Annotated[str, typer.Option(help="Budget of the process; by default 95 % of the limit.")] = "auto",
    hidden: Annotated[int, typer.Option(min=HEAD_WIDTH, help="Model width.")] = 4096,
    steps: Annotated[int, typer.Option(min=2, help="Decode steps that are timed.")] = 8,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the result as JSON.")] = None,
    record: Annotated[bool, typer.Option("--record", help="Keep the result under experiments/records.")] = False,
    records: Annotated[Path, typer.Option(help="Where records live.")] = RECORDS,
) -> None:
    """Decode with weights that do not fit: seconds of a step beside those of the disk and of the processor.

    The machine must be quiet and hold the whole model once, for the bits and the processor's seconds.

    Example: `expertier bench streamed --folder /data/scratch --size 6GB --limit 3GiB`

    A mixture: `expertier bench streamed --folder /data/scratch --kind experts --limit 2GiB`
    """
    expect_choice(kind, KINDS, "kind")
    expect_outputs(json_file, inputs=[])
    expect_records(records)
    expect_folder(folder / "model")
    limit_bytes = None if limit == "none" else parse_size(limit)
    budget = _budget(memory, limit_bytes)
    config = config_of(kind, parse_size(size), hidden)
    check_parity(kind)
    with tempfile.TemporaryDirectory(dir=folder, prefix="expertier-streamed-") as place:
        written = save_generated(Path(place), config, SHARD_BYTES, seed=SEED)
        row = {"kind": kind, "nbytes": written.nbytes, "limit": limit, "budget": budget, "n": steps}
        row |= _compared(Path(place), limit_bytes, budget, steps)
    _print(row)
    if json_file:
        write_json(json_file, row)
    if record:
        kept = {"hidden": hidden, "layers": config["num_hidden_layers"], "goal": GOALS[kind]}
        typer.echo(f"record: {save_record(f'bench-streamed-{kind}', [row], config=kept, seed=SEED, folder=records)}")


def _budget(memory: str, limit_bytes: int | None) -> int | str:
    """What `load` is told: less than the group, whose page cache and kernel memory count too."""
    if memory != "auto":
        return parse_size(memory)
    return "auto" if limit_bytes is None else limit_bytes * 95 // 100


def config_of(kind: str, nbytes: int, hidden: int, vocabulary: int = VOCABULARY) -> dict[str, Any]:
    """A model of about so many bytes.

    Raises:
        ValueError: if not even one layer has room.
    """
    one, two = (checkpoint_bytes(KINDS[kind](hidden, layers, vocabulary)) for layers in (1, 2))
    layers = 1 + round((nbytes - one) / (two - one))
    if layers < 1:
        raise ValueError(f"--size {format_size(nbytes)} is less than one layer of width {hidden} with its embedding")
    return KINDS[kind](hidden, layers, vocabulary)


def check_parity(kind: str) -> None:
    """Streamed logits must be the resident model's, bit by bit, on a small model, before anything is timed.

    Raises:
        RuntimeError: if they are not.
    """
    import torch

    import offload

    from ...evidence import resident

    ids = torch.arange(12)[None]
    with tempfile.TemporaryDirectory() as place, torch.inference_mode():
        save_generated(Path(place), KINDS[kind](HEAD_WIDTH, 3, 256), SHARD_BYTES, seed=SEED)
        expected = resident.load_resident(Path(place), dtype=torch.bfloat16)(ids).logits
        for ahead in (0, 1):
            model = offload.load(place, resident_layers=0, layers_ahead=ahead)
            try:
                found = model(ids).logits
            finally:
                model.offload.close()
            if not torch.equal(found, expected):
                raise RuntimeError(f"streaming with {ahead} layers ahead changes the output; nothing is measured")


def _compared(checkpoint: Path, limit_bytes: int | None, budget: int | str, steps: int) -> dict[str, Any]:
    """Measure with all weights in memory, then within the limit.

    Raises:
        ValueError: if all weights are within the limit.
        RuntimeError: if the logits differ.
    """
    given = {"checkpoint": str(checkpoint), "steps": steps}
    whole = measured("streamed", memory="auto", **given)
    drop_cached(checkpoint)
    rate = disk_rate(checkpoint)
    found = measured("streamed", limit_bytes, memory=budget, **given)
    if not found["layers"][1]:
        raise ValueError("all weights fit, so nothing is streamed; give a smaller --memory or a larger --size")
    if found["digest"] != whole["digest"]:
        raise RuntimeError("a smaller budget changes the output; no time is told")
    step_s, compute_s = median(found["step_s"]), median(whole["step_s"])
    rate = max(rate, disk_rate(checkpoint))  # of a disk that others use, too, the bound is told too low otherwise
    disk_s = found["bytes_per_step"] / rate
    return {
        "outside_bytes": whole["outside_bytes"],
        "bytes_per_step": found["bytes_per_step"],
        "disk_bytes_per_s": rate,
        "step_s": step_s,
        "disk_s": disk_s,
        "compute_s": compute_s,
        "share_of_bound": max(disk_s, compute_s) / step_s,
        "stall_s": found["stall_s"],
        "layers": found["layers"],
        "peak_bytes": found["peak_bytes"],
    }


def disk_rate(checkpoint: Path) -> float:
    """Bytes per second of a checkpoint's first shard, as reading threads read it, past the page cache."""
    from offload import disk_bandwidth

    return disk_bandwidth(sorted(checkpoint.glob("*.safetensors"))[0], num_threads=4, read_bytes=4 << 20)


def measure(checkpoint: str, steps: int, memory: int | str) -> dict[str, Any]:
    """Decode fixed tokens within a budget: seconds of each step, bytes that it read, and a digest of all logits."""
    import torch
    import transformers

    import offload

    transformers.logging.disable_progress_bar()
    model = offload.load(checkpoint, cpu_memory=memory, context=steps + 16, io="direct")
    digest, step_s = sha256(), list[float]()
    with torch.inference_mode():
        output = model(torch.arange(12)[None], use_cache=True, logits_to_keep=1)
        output = model(torch.tensor([[12]]), past_key_values=output.past_key_values, use_cache=True)
        model.offload.reset()
        for step in range(steps):
            began = time.perf_counter()
            output = model(torch.tensor([[13 + step]]), past_key_values=output.past_key_values, use_cache=True)
            step_s.append(time.perf_counter() - began)
            digest.update(output.logits.view(torch.uint8).numpy().tobytes())
    report = model.offload.report()
    window = report.get("window", {})
    read = window.get("bytes_read", 0) + report["bytes_missed"]
    return {
        "step_s": step_s,
        "digest": digest.hexdigest(),
        "bytes_per_step": read / steps,
        "outside_bytes": report["memory"]["weight_bytes"],
        "stall_s": report["stall_s"] / steps,
        "layers": [window.get("resident_layers"), window.get("streamed_layers"), window.get("layers_ahead")],
    }


def _print(row: dict[str, Any]) -> None:
    resident, streamed, ahead = row["layers"]
    plain_console().print(
        f"{row['kind']}, {format_size(row['nbytes'])} ({format_size(row['outside_bytes'])} outside experts), limit "
        f"{row['limit']}: {resident} layers stay, {streamed} are streamed, {ahead} ahead; bits equal\n"
        f"step {row['step_s']:.3f} s; disk {row['disk_s']:.3f} s ({row['disk_bytes_per_s'] / 1e9:.2f} GB/s), processor "
        f"{row['compute_s']:.3f} s: {row['share_of_bound']:.0%} of the bound",
        highlight=False,
    )
