"""`expertier calibrate` and `fit`: what this machine can do, and whether a model fits it."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from routing.ground.files import write_json
from routing.ground.quantity import format_size

from .options import CpuMemory, JsonFile, Model, expect_folder, quiet_transformers


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
    from ..forecast.fit import fit as fit_model

    quiet_transformers()
    fitted = fit_model(model, cpu_memory=cpu_memory, gpu_memory=gpu_memory, context=context, pack=packed)
    console = Console()
    first = fitted.forms[0]
    console.print(
        f"{len(fitted.forms)} MoE layers x {first.layer.num_experts} experts of {format_size(first.expert_bytes)}, "
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
            f"fits {format_size(fitted.plan.limit_bytes)} with {min(slots)} to {max(slots)} of "
            f"{first.layer.num_experts} experts per layer in memory",
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

    from ..gpu.budget import gpu_table

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


def calibrate(
    out: Annotated[Path, typer.Option("--out", help="Where the rates go.")] = Path("hardware.toml"),
    folder: Annotated[Path, typer.Option("--folder", help="A folder on the disk that holds the models.")] = Path(),
) -> None:
    """Measure the disk, the memory and the kernels of this machine.

    Example: `expertier calibrate --out hardware.toml --folder /data/models`
    """
    from ..forecast.calibrate import calibrate as measure

    expect_folder(out)
    if not folder.is_dir():
        raise ValueError(f"folder {folder}: no such folder")
    found = measure(folder)
    found.save(out)
    table = Table("rate", "value")
    for name, value in vars(found).items():
        shown = f"{value / 1e9:.2f} GB/s" if name.endswith("_bytes_per_s") else f"{value * 1e6:.1f} us"
        table.add_row(name.removesuffix("_bytes_per_s"), shown)
    Console().print(table)
