"""`expertier calibrate` and `fit`: what this machine can do, and whether a model fits it."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from routing.ground.expect import expect_folder, expect_name, expect_outputs
from routing.ground.files import write_json
from routing.ground.hardware import Hardware as Rates
from routing.ground.quantity import format_size, parse_size
from routing.ground.terminal import plain_console
from routing.traces import RoutingTrace

from .batches import fit_batches, read_batches
from .options import (
    ARITHMETICS,
    Arithmetic,
    Context,
    CpuMemory,
    Hardware,
    JsonFile,
    LayersAhead,
    Model,
    Pack,
    ResidentLayers,
    expect_model,
    quiet_transformers,
)
from .tuning.fit import fit_finetune

# exit code of `fit`: bad input is 2
DOES_NOT_FIT = 1
SLOWER = 0.75
"""Where exact products reach less of ours than this, torch computed them: its own reach about half. Not tuned."""
WORDS = {
    "disk_bytes_per_s": "reads of the disk, past the page cache",
    "cached_bytes_per_s": "reads out of the page cache",
    "memory_bytes_per_s": "reads of memory",
    "exact_bytes_per_s": "weights that a token's products read, --arithmetic exact",
    "fast_bytes_per_s": "weights that a token's products read, --arithmetic fast",
    "layer_s": "a decoder layer, per token, besides reading weights",
    "compressed_bytes_per_s": "compressed weights that a token's products read",
    "pcie_bytes_per_s": "copies from memory to the GPU",
    "gpu_bytes_per_s": "reads of the GPU's memory",
}


def fit(
    model: Model,
    cpu_memory: CpuMemory = "auto",
    gpu_memory: Annotated[
        str | None, typer.Option("--gpu-memory", help="Budget on a GPU, such as 8GiB; it need not be here.")
    ] = None,
    context: Context = 2048,
    hardware: Hardware = None,
    arithmetic: Arithmetic = "auto",
    packed: Pack = None,
    resident_layers: ResidentLayers = None,
    layers_ahead: LayersAhead = None,
    hit_rate: Annotated[
        float | None,
        typer.Option("--hit-rate", min=0, max=1, help="Known hit rate, for example of `simulate`; needs --hardware."),
    ] = None,
    finetune: Annotated[
        str | None,
        typer.Option("--finetune", help="zo, lora or full: what fine-tuning takes; a step has --context tokens."),
    ] = None,
    activation_memory: Annotated[
        str | None,
        typer.Option("--activation-memory", help="With --finetune lora or full: activations in memory, such as 2GiB."),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option("--trace", help="Recorded routing (.npz) to take the hit rate from; needs --hardware."),
    ] = None,
    batch: Annotated[
        str | None,
        typer.Option(
            "--batch",
            help="Sequences that decode together, such as 1,4,16: which is quickest within the "
            "budget. --context is then of each; needs --trace.",
        ),
    ] = None,
    chunk: Annotated[
        int, typer.Option("--chunk", min=0, help="Tokens of a prompt that each step reads beside the sequences.")
    ] = 0,
    json_file: JsonFile = None,
) -> None:
    """Say whether a model fits a memory budget, and how many of its experts stay in memory.

    Of a model on the hub, a few MB are downloaded: the config, the index, and the head of each file. With --hardware
    it also says how fast each way of running the model would be, as a range, and which one is quickest.

    The exit code is 0 if it fits and 1 if it does not.

    With --batch it predicts that for several sequences: their keys and values take slots, their tokens share reads.

    Example: `expertier fit my-model --cpu-memory 6GiB`
    """
    expect_model(model)
    expect_outputs(json_file, inputs=[model, hardware, packed, trace])
    expect_name(arithmetic, ARITHMETICS, "arithmetic")
    for size in (cpu_memory, gpu_memory):
        if size not in (None, "auto"):
            parse_size(size)
    if hit_rate is not None and (hardware is None or gpu_memory is not None):
        raise ValueError("--hit-rate predicts the speed on the CPU: it needs --hardware FILE, and no --gpu-memory")
    if trace is not None and (hit_rate is not None or hardware is None or gpu_memory is not None):
        raise ValueError("--trace gives the hit rate on the CPU: it needs --hardware FILE, and no --hit-rate")
    batches = None if batch is None else read_batches(batch)
    if (batches is not None and trace is None) or (chunk and batches is None):
        raise ValueError("--batch asks recorded routing: it needs --trace FILE; --chunk needs --batch")
    rates = None if hardware is None else Rates.load(hardware)
    if activation_memory is not None and finetune is None:
        raise ValueError("--activation-memory is of fine-tuning; give --finetune lora or full")
    if finetune is not None:
        if gpu_memory is not None or packed is not None:
            raise ValueError(
                "--finetune plans for the CPU and the model's own files; leave out --gpu-memory and --pack"
            )
        quiet_transformers()
        if not fit_finetune(model, finetune, cpu_memory, context, activation_memory, rates, json_file):
            raise typer.Exit(DOES_NOT_FIT)
        return
    recorded = _recorded(trace)
    with plain_console(stderr=True).status(f"reading what {model} consists of"):
        from ..forecast.fit import fit as fit_model

        quiet_transformers()
        fitted = fit_model(
            model,
            cpu_memory=cpu_memory,
            gpu_memory=gpu_memory,
            context=context,
            pack=packed,
            resident_layers=resident_layers,
            layers_ahead=layers_ahead,
        )
    _show_fit(fitted, cpu_memory)
    predicted: dict[str, Any] = {}
    variants: list[Any] = []
    if fitted.gpu_plan is not None:
        predicted = _gpu_fit(fitted, rates)
    elif fitted.bundle is not None:
        plain_console(soft_wrap=True).print(
            "speeds by units depend on the text: how many are active shows when it runs"
        )
    elif rates is not None and fitted.plan is not None:
        if recorded is not None:
            hit_rate = fitted.traced_hit_rate(recorded)
            plain_console(soft_wrap=True).print(f"on {trace}, {hit_rate:.1%} of the experts are hit with these slots")
        predicted = _predict(fitted, rates, arithmetic, hit_rate)
        variants = _show_variants(fitted, rates)
    elif fitted.plan is not None:
        plain_console(soft_wrap=True).print("for speeds, add --hardware FILE of `expertier calibrate`")
    asked: dict[str, Any] = {}
    if batches is not None and rates is not None and recorded is not None:
        knobs = {"cpu_memory": cpu_memory, "pack": packed, "resident_layers": resident_layers}
        asked["batches"] = fit_batches(
            model, recorded, rates, batches, context, chunk, layers_ahead=layers_ahead, **knobs
        )
    if json_file:
        told = {"predicted": predicted or None, "variants": [variant.as_json() for variant in variants]} | asked
        write_json(json_file, {"model": model, **fitted.as_json(), **told})
    if fitted.plan is None:
        raise typer.Exit(DOES_NOT_FIT)


def _recorded(trace: Path | None) -> RoutingTrace | None:
    """The routing in a file.

    Raises:
        ValueError: if it is missing or damaged.
    """
    return None if trace is None else RoutingTrace.load(trace)


def _show_fit(fitted: Any, cpu_memory: str) -> None:
    console = plain_console(soft_wrap=True)
    console.print(_consists_of(fitted))
    if fitted.gpu_plan is None:
        _show_budgets(fitted.budgets)
    if fitted.plan is None:
        console.print(f"does not fit: {fitted.shortfall}")
        return
    table = Table("memory", "size")
    for name, size in fitted.plan.table():
        table.add_row(name, format_size(size))
    console.print(table)
    console.print(f"fits {format_size(fitted.plan.limit_bytes)} with {_held_by(fitted)} in memory")
    if fitted.window is not None and fitted.window.tables:
        tables = sum(table.nbytes for table in fitted.window.tables)
        console.print(f"read by rows: {format_size(tables)} of tables that token ids look up")
    if fitted.streamed_bytes:
        console.print(
            f"streamed for each token: {format_size(fitted.streamed_bytes)} of layers outside experts, "
            f"{fitted.window.ahead} ahead"
        )
    if fitted.forms:
        held = sum(count * form.expert_bytes for count, form in zip(fitted.plan.num_slots, fitted.forms, strict=True))
        on_disk = format_size(max(fitted.expert_bytes - held, 0))
        console.print(f"of the experts, {format_size(held)} stay in RAM and {on_disk} on the disk")
    _warn_of_size(cpu_memory)


def _consists_of(fitted: Any) -> str:
    if fitted.bundle is not None:
        units = sum(layer.num_units for layer in fitted.bundle.layers)
        return (
            f"{units} hidden units in {len(fitted.bundle.layers)} layers, {format_size(fitted.bundle.nbytes)} of them, "
            f"and {format_size(fitted.dense_bytes)} of other weights"
        )
    if not fitted.forms:
        return f"a dense model of {format_size(fitted.dense_bytes)}"
    sizes = {form.expert_bytes for form in fitted.forms}
    size = format_size(max(sizes)) if len(sizes) == 1 else f"{format_size(min(sizes))} to {format_size(max(sizes))}"
    return (
        f"{len(fitted.forms)} MoE layers x {fitted.forms[0].layer.num_experts} experts of {size}, "
        f"top-{fitted.top_k}: {format_size(fitted.expert_bytes)} of experts, "
        f"{format_size(fitted.active_bytes)} used by each token"
    )


def _held_by(fitted: Any) -> str:
    """How much of a model that fits is in memory."""
    if fitted.bundle is not None:
        units = sum(layer.num_units for layer in fitted.bundle.layers)
        return f"{sum(fitted.unit_slots)} of {units} units"
    if fitted.streamed_bytes:
        layers = f"{fitted.window.num_resident} of {len(fitted.window.guests.passing)} layers"
    else:
        layers = "all layers"
    if not fitted.forms:
        return layers
    slots, count = fitted.plan.num_slots, fitted.forms[0].layer.num_experts
    held = f"{min(slots)}" if min(slots) == max(slots) else f"{min(slots)} to {max(slots)}"
    experts = f"{'all' if min(slots) >= count else f'{held} of {count}'} experts of each layer"
    return f"{layers} and {experts}" if fitted.streamed_bytes else experts


def _show_budgets(budgets: Any) -> None:
    from ..memory.budget import available_memory, sufficient_size

    plain_console(soft_wrap=True).print(
        f"needs {sufficient_size(budgets.least_bytes)} at least, {sufficient_size(budgets.all_bytes)} to hold all; "
        f"here are {format_size(available_memory())}"
    )


def _warn_of_size(cpu_memory: str) -> None:
    """Say so if the budget is more than this machine or its control group has; the model may be for another one."""
    from ..memory.budget import available_memory

    if cpu_memory != "auto" and parse_size(cpu_memory) > (here := available_memory()):
        plain_console(stderr=True, soft_wrap=True).print(
            f"warning: only {format_size(here)} are free here; with {cpu_memory} the process would be killed or swap"
        )


def _is_ours(arithmetic: str, rates: Rates) -> bool:
    """Whether products will be ours whatever their bits; `auto` takes them where exact ones would be slower."""
    return arithmetic in ("fixed", "fast") or (
        arithmetic == "auto" and rates.exact_bytes_per_s < SLOWER * rates.fast_bytes_per_s
    )


def _predict(fitted: Any, rates: Rates, arithmetic: str, hit_rate: float | None) -> dict[str, Any]:
    found = fitted.predict(rates, is_fast=_is_ours(arithmetic, rates), hit_rate=hit_rate)
    plain_console(soft_wrap=True).print(
        f"expected {1 / found.token_s:.2f} tok/s (at best {1 / found.floor_s:.2f}); "
        f"{found.binds} binds: disk {found.disk_s:.3f} s, memory {found.compute_s:.3f} s per token"
    )
    return {"tokens_per_second": 1 / found.token_s, "binds": found.binds, **vars(found)}


def _show_variants(fitted: Any, rates: Rates) -> list[Any]:
    """A line for each way to run the model; gives them."""
    from ..forecast.variants import variants_of

    found, console = variants_of(fitted, rates), plain_console(soft_wrap=True)
    for each in found:
        options = f" ({each.options})" if each.options else ""
        console.print(
            f"{each.what}{options}: {format_size(each.expert_bytes)} of experts, {each.share:.0%} in memory; "
            f"{each.least:.2f} to {each.most:.2f} tok/s, {each.expected:.2f} expected, {each.binds} binds"
        )
    console.print(f"quickest within {format_size(fitted.plan.limit_bytes)}: {found[0].what}")
    return found


def _gpu_fit(fitted: Any, rates: Rates | None) -> dict[str, Any]:
    """What goes to the GPU, and how fast it may be."""
    from ..gpu.plan.budget import gpu_table

    console = plain_console(soft_wrap=True)
    table = Table("GPU memory", "size")
    for name, size in gpu_table(fitted.gpu_plan):
        table.add_row(name, format_size(size))
    console.print(table)
    if rates is None or fitted.plan is None:
        return {}
    found = fitted.predict_gpu(rates)
    console.print(
        f"expected up to {1 / found.token_s:.1f} tok/s; {found.binds} binds: disk {found.disk_s:.3f} s, "
        f"PCIe {found.wire_s:.3f} s, GPU memory {found.gpu_s:.3f} s per token"
    )
    return {"tokens_per_second": 1 / found.token_s, "binds": found.binds, **vars(found)}


def calibrate(
    out: Annotated[Path, typer.Option("--out", help="Where the rates go (TOML).")] = Path("hardware.toml"),
    folder: Annotated[Path, typer.Option("--folder", help="A folder on the disk that holds the models.")] = Path(),
) -> None:
    """Measure the disk, the memory and the kernels of this machine; takes some fifteen seconds and 512 MiB of disk.

    Example: `expertier calibrate --out hardware.toml --folder /data/models`
    """
    expect_folder(out)
    if out.exists() and b"disk_bytes_per_s" not in out.read_bytes()[:4096]:
        raise ValueError(f"cannot write {out}: it is there and is no file of `expertier calibrate`")
    if not folder.is_dir():
        raise ValueError(f"folder {folder}: no such folder")
    with plain_console(stderr=True).status("measuring disk, memory and kernels"):
        from ..forecast.calibrate import calibrate as measure

        found = measure(folder)
    found.save(out)
    show_rates(found)


def show_rates(rates: Rates) -> None:
    """Print what was measured; what this machine has not (a GPU, a C compiler) is left out.

    Args:
        rates: of this machine.
    """
    table = Table("what", "rate")
    for name, value in vars(rates).items():
        if value:
            shown = f"{value / 1e9:.2f} GB/s" if name.endswith("_bytes_per_s") else f"{value * 1e6:.1f} us"
            table.add_row(WORDS.get(name, name), shown)
    plain_console().print(table)
