"""`expertier generate`, `fit`, `simulate`, `trace record`: run a model whose experts do not fit in fast memory."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from routing.ground.files import write_json
from routing.ground.quantity import format_size
from routing.traces import RoutingTrace

app = typer.Typer()

Model = Annotated[str, typer.Argument(help="A Hugging Face model folder (safetensors) or a model id.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Also write the report as JSON.")]
CpuMemory = Annotated[
    str, typer.Option("--cpu-memory", help="Budget for everything the process has in RAM, such as 6GiB.")
]
GpuMemory = Annotated[str, typer.Option("--gpu-memory", help="Budget for everything on the GPU, such as 8GiB.")]
CacheExperts = Annotated[
    int | None, typer.Option("--cache-experts", help="RAM slots per MoE layer, instead of what the budget pays for.")
]
Policy = Annotated[str, typer.Option("--policy", help="Which expert leaves the cache when another needs its slot.")]


@app.command("generate")
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

    from .generation import generate_text
    from .loading import load

    _quiet_transformers()
    for target in (trace, json_file):
        _expect_folder(target)
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


@app.command("pack")
def pack(
    model: Model,
    out: Annotated[Path, typer.Option("--out", help="The file to write; its index goes beside it.")],
    compress: Annotated[
        bool, typer.Option("--compress", help="Without loss: bfloat16 weights take 30 % less on disk and in RAM.")
    ] = False,
) -> None:
    """Copy all experts of a model into one file of aligned, checksummed records; resumes if it was interrupted.

    Example: `expertier pack my-model --out my-model.experts --compress`
    """
    from rich.progress import Progress

    from .packing import write_pack

    _quiet_transformers()
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("packing", total=None)
        write_pack(
            model,
            out,
            is_compressed=compress,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    Console(stderr=True).print(f"experts packed in {out}, {format_size(out.stat().st_size)}", highlight=False)


@app.command("fit")
def fit(
    model: Model,
    cpu_memory: CpuMemory = "auto",
    gpu_memory: Annotated[
        str | None, typer.Option("--gpu-memory", help="Budget on a GPU, such as 8GiB; it need not be here.")
    ] = None,
    context: Annotated[int, typer.Option("--context", min=1, help="Tokens of KV cache to keep room for.")] = 2048,
    hardware: Annotated[
        Path | None, typer.Option("--hardware", help="Rates of this machine from `calibrate`, to predict the speed.")
    ] = None,
    arithmetic: Annotated[str, typer.Option("--arithmetic", help="exact or fast.")] = "exact",
    packed: Annotated[Path | None, typer.Option("--pack", help="With experts from this packed copy.")] = None,
    hit_rate: Annotated[
        float | None, typer.Option("--hit-rate", min=0, max=1, help="Known hit rate, for example from `simulate`.")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Say whether a model fits a memory budget, and how many of its experts stay in memory.

    Example: `expertier fit my-model --cpu-memory 6GiB`
    """
    from .fit import fit as fit_model

    _quiet_transformers()
    fitted = fit_model(model, cpu_memory=cpu_memory, gpu_memory=gpu_memory, context=context, pack=packed)
    console = Console()
    first = fitted.layers[0]
    console.print(
        f"{len(fitted.layers)} MoE layers x {first.num_experts} experts of {format_size(first.expert_bytes)}, "
        f"top-{fitted.top_k}: {format_size(fitted.expert_bytes)} of experts, "
        f"{format_size(fitted.active_bytes)} used by each token",
        highlight=False,
    )
    if fitted.plan is None:
        console.print(f"does not fit: {fitted.shortfall}", highlight=False)
    else:
        table = Table("memory", "size")
        for name, size in fitted.plan.table():
            table.add_row(name, format_size(size))
        console.print(table)
        slots = fitted.plan.num_slots
        console.print(
            f"fits {format_size(fitted.plan.limit_bytes)} with {min(slots)} to {max(slots)} of {first.num_experts} "
            "experts per layer in memory",
            highlight=False,
        )
    predicted: dict[str, Any] = {}
    if fitted.gpu_plan is not None:
        predicted = _gpu_fit(console, fitted, hardware)
    elif hardware is not None and fitted.plan is not None:
        from routing.ground.hardware import Hardware

        prediction = fitted.predict(Hardware.load(hardware), is_fast=arithmetic == "fast", hit_rate=hit_rate)
        console.print(
            f"expected {1 / prediction.token_s:.2f} tok/s (at best {1 / prediction.floor_s:.2f}); "
            f"{prediction.binds} binds: disk {prediction.disk_s:.3f} s, memory {prediction.compute_s:.3f} s per token",
            highlight=False,
        )
        predicted = {"tokens_per_second": 1 / prediction.token_s, "binds": prediction.binds, **vars(prediction)}
    if json_file:
        write_json(json_file, {"model": model, **fitted.as_json(), "predicted": predicted or None})


def _gpu_fit(console: Console, fitted: Any, hardware: Path | None) -> dict[str, Any]:
    """What goes to the GPU, and how fast it may be."""
    from routing.ground.hardware import Hardware

    from .gpu.budget import gpu_table

    table = Table("GPU memory", "size")
    for name, size in gpu_table(fitted.gpu_plan):
        table.add_row(name, format_size(size))
    console.print(table)
    if hardware is None or fitted.plan is None:
        return {}
    found = fitted.predict_gpu(Hardware.load(hardware))
    console.print(
        f"expected up to {1 / found.token_s:.1f} tok/s; {found.binds} binds: disk {found.disk_s:.3f} s, "
        f"PCIe {found.wire_s:.3f} s, GPU memory {found.gpu_s:.3f} s per token",
        highlight=False,
    )
    return {"tokens_per_second": 1 / found.token_s, "binds": found.binds, **vars(found)}


@app.command("calibrate")
def calibrate(
    out: Annotated[Path, typer.Option("--out", help="Where the rates go.")] = Path("hardware.toml"),
    folder: Annotated[Path, typer.Option("--folder", help="A folder on the disk that holds the models.")] = Path(),
) -> None:
    """Measure the disk, the memory and the kernels of this machine.

    Example: `expertier calibrate --out hardware.toml --folder /data/models`
    """
    from .calibrate import calibrate as measure

    _expect_folder(out)
    if not folder.is_dir():
        raise ValueError(f"folder {folder}: no such folder")
    found = measure(folder)
    found.save(out)
    table = Table("rate", "value")
    for name, value in vars(found).items():
        shown = f"{value / 1e9:.2f} GB/s" if name.endswith("_bytes_per_s") else f"{value * 1e6:.1f} us"
        table.add_row(name.removesuffix("_bytes_per_s"), shown)
    Console().print(table)


@app.command("simulate")
def simulate(
    trace: Annotated[Path, typer.Argument(help="A routing trace (.npz).")],
    cache_experts: Annotated[int, typer.Option("--cache-experts", min=1, help="Experts the cache holds.")],
    per_layer: Annotated[bool, typer.Option("--per-layer", help="That many for each layer, not in total.")] = False,
    rows: Annotated[int | None, typer.Option("--rows", min=1, help="Only the first rows of the trace.")] = None,
    policy: Annotated[list[str] | None, typer.Option("--policy", help="Policy to simulate; repeat for more.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Print the hit rate that each cache policy would have had on a recorded trace, and how much of the way from LRU to
    Belady that is; these two are always simulated.

    Example: `expertier simulate routing.npz --cache-experts 8 --per-layer --policy lru --policy belady`
    """
    from .simulate import DEFAULT_POLICIES, gap_closed
    from .simulate import simulate as run

    _expect_folder(json_file)
    recorded = RoutingTrace.load(trace).rows(0, rows)
    policies = dict.fromkeys(["lru", *(policy or DEFAULT_POLICIES), "belady"])
    results = run(recorded, cache_experts, per_layer=per_layer, policies=list(policies))
    shares = gap_closed(results)
    table = Table("policy", "hit rate", "of the gap closed", "worst layer", "best layer")
    for name, result in results.items():
        worst, best = result.hit_rate_L.min(), result.hit_rate_L.max()
        share = "-" if shares[name] is None else f"{shares[name]:.0%}"
        table.add_row(name, f"{result.hit_rate:.4f}", share, f"{worst:.4f}", f"{best:.4f}")
    Console().print(table)
    if json_file:
        write_json(
            json_file,
            {
                "trace": str(trace),
                "rows": recorded.num_tokens,
                "cache_experts": cache_experts,
                "per_layer": per_layer,
                "policies": {
                    name: {
                        "hit_rate": result.hit_rate,
                        "gap_closed": shares[name],
                        "hits": int(result.hits_L.sum()),
                        "accesses": int(result.accesses_L.sum()),
                        "hit_rate_L": result.hit_rate_L.tolist(),
                    }
                    for name, result in results.items()
                },
            },
        )


def record(
    model: Model,
    data: Annotated[Path, typer.Option("--data", help="A text file, or a folder of text files.")],
    out: Annotated[Path, typer.Option("--out", help="Where the trace goes (.npz).")],
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Tokens to run.")] = 8192,
    length: Annotated[int, typer.Option("--length", min=1, help="Tokens per sequence.")] = 512,
    cpu_memory: CpuMemory = "auto",
    cache_experts: CacheExperts = None,
) -> None:
    """Run a model over text and record which experts each token uses.

    Example: `expertier trace record my-model --data book.txt --out routing.npz`
    """
    from moe import text_of

    from .corpus import sequences, text_files
    from .loading import load

    _quiet_transformers()
    _expect_folder(out)
    text_files(data)
    loaded = load(model, cpu_memory=cpu_memory, cache_experts=cache_experts, record_trace=True)
    text = text_of(Path(loaded.name_or_path), int(loaded.config.get_text_config().vocab_size))
    done = _run_over(loaded, sequences(data, text, length, tokens), tokens, out)
    Console(stderr=True).print(f"{done} tokens recorded in {out}", highlight=False)


def _run_over(model: Any, pieces: Any, tokens: int, out: Path) -> int:
    import time

    import torch
    from rich.progress import Progress

    done, saved_s = 0, time.perf_counter()
    try:
        with Progress(console=Console(stderr=True), transient=True) as progress, torch.no_grad():
            task = progress.add_task("recording", total=tokens)
            for piece in pieces:
                model(torch.tensor([piece]), use_cache=False)
                done += len(piece)
                progress.advance(task, len(piece))
                if time.perf_counter() - saved_s > 5:
                    model.offload.save_trace(out)
                    saved_s = time.perf_counter()
    finally:
        if done:
            model.offload.save_trace(out)
    if not done:
        raise ValueError("the data holds no text")
    return done


def _expect_folder(file: Path | None) -> None:
    if file is not None and not file.absolute().parent.is_dir():
        raise ValueError(f"cannot write {file}: the folder {file.absolute().parent} does not exist; create it first")


def _show(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()


def _quiet_transformers() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
