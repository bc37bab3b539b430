"""`expertier generate`: continue a text with the experts on disk and in a bounded part of memory."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from routing.ground.files import write_json
from routing.ground.quantity import format_size

from .options import CacheExperts, CpuMemory, GpuMemory, JsonFile, Model, Policy, expect_folder, quiet_transformers


def generate(
    model: Model,
    prompt: Annotated[str, typer.Option("--prompt", help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Tokens to generate.")] = 64,
    cpu_memory: CpuMemory = "auto",
    cache_experts: CacheExperts = None,
    policy: Policy = "auto",
    arithmetic: Annotated[
        str,
        typer.Option("--arithmetic", help="exact: the resident model's bits; fast: a quicker kernel, other last bits."),
    ] = "exact",
    io: Annotated[
        str, typer.Option("--io", help="direct reads past the page cache, cached through it, or auto.")
    ] = "auto",
    packed: Annotated[Path | None, typer.Option("--pack", help="Read experts from this packed copy.")] = None,
    prefetch: Annotated[
        str, typer.Option("--prefetch", help="off, gate, transitions, plan, or a file of `trace predictor`.")
    ] = "auto",
    plan: Annotated[
        Path | None,
        typer.Option("--plan", help="A plan of `place tiers`, or a trace (.npz) to size each layer by."),
    ] = None,
    device: Annotated[
        str, typer.Option("--device", help="cpu, cuda, or auto: cuda if --gpu-memory names a size.")
    ] = "auto",
    gpu_memory: GpuMemory = "auto",
    trace: Annotated[Path | None, typer.Option("--trace", help="Record the routing into this .npz file.")] = None,
    hardware: Annotated[
        Path | None,
        typer.Option(
            "--hardware", help="Rates of this machine from `calibrate`, to say what speed was to be expected."
        ),
    ] = None,
    live: Annotated[bool, typer.Option("--live", help="Say speed, hits and bytes while it runs, on stderr.")] = False,
    json_file: JsonFile = None,
) -> None:
    """Continue a text greedily with the experts on disk and in a bounded part of RAM.

    Example: `expertier generate my-model --prompt "def main():" --cpu-memory 6GiB --json report.json`

    With a GPU: `expertier generate my-model --prompt "def main():" --device cuda --gpu-memory 8GiB --cpu-memory 32GiB`
    """
    from moe import text_of
    from routing.ground.hardware import Hardware

    from ..runtime.loading import load
    from ..serve.generation import generate_text

    quiet_transformers()
    for target in (trace, json_file):
        expect_folder(target)
    rates = None if hardware is None else Hardware.load(hardware)
    loaded = load(
        model,
        cpu_memory=cpu_memory,
        cache_experts=cache_experts,
        policy=policy,
        io=io,
        arithmetic=arithmetic,
        pack=packed,
        prefetch=prefetch,
        plan=plan,
        device=device,
        gpu_memory=gpu_memory,
        record_trace=trace is not None,
    )
    text = text_of(Path(loaded.name_or_path), int(loaded.config.get_text_config().vocab_size))
    result = generate_text(
        loaded,
        text,
        text.encode(prompt),
        max_new_tokens=max_new_tokens,
        show=_show,
        trace_file=trace,
        say=_say if live else None,
        hardware=rates,
    )
    _show("\n")
    if predicted := result["predicted"]:
        Console(stderr=True).print(
            f"expected {predicted['tokens_per_second']:.2f} tok/s ({predicted['binds']} binds), "
            f"achieved {result['tokens_per_second']:.2f}",
            highlight=False,
        )
    Console(stderr=True).print(
        f"{result['tokens_per_second']:.2f} tok/s, prefill {result['prefill_seconds']:.2f} s, "
        f"hit rate {result['hit_rate']:.3f}, read {format_size(result['bytes_read'])}, "
        f"peak memory {format_size(result['peak_memory_bytes'])}",
        highlight=False,
    )
    if json_file:
        write_json(json_file, {"model": model, "prompt": prompt, **result})


def _say(line: str) -> None:
    sys.stderr.write(f"\r\x1b[K{line}")
    sys.stderr.flush()


def _show(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()
