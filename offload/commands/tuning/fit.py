"""What `expertier fit --finetune` prints."""

from pathlib import Path
from typing import Any

from rich.table import Table

from routing.ground.expect import expect_choice
from routing.ground.files import write_json
from routing.ground.hardware import Hardware
from routing.ground.quantity import format_size, parse_size
from routing.ground.terminal import plain_console

from ...finetune.options import METHODS


def fit_finetune(
    model: str,
    method: str,
    cpu_memory: str,
    tokens: int,
    activation_memory: str | None,
    rates: Hardware | None,
    json_file: Path | None,
) -> bool:
    """Print what fine-tuning would take; whether it fits.

    Args:
        model: a model folder or id.
        method: name in METHODS.
        cpu_memory: the budget of the process.
        tokens: tokens of one step.
        activation_memory: what activations may take, such as `2GiB`; None for all that there are.
        rates: of this machine; adds seconds, the batch that hides the disk, and the wear of the SSD.
        json_file: where the report goes as well.
    """
    expect_choice(method, METHODS, "finetune")
    from ...finetune.forecast import default_options, foresee, product_flops

    limit = None if activation_memory is None else parse_size(activation_memory)
    found = foresee(model, default_options(method, tokens, limit), cpu_memory)
    told = found.as_json(tokens, rates, product_flops(found.forms) if rates is not None else None)
    _show(found, told, rates is not None)
    if json_file:
        write_json(json_file, {"model": model, **told})
    return found.plan is not None


def _show(found: Any, told: dict[str, Any], has_rates: bool) -> None:
    console = plain_console(soft_wrap=True)
    if found.plan is None:
        console.print(f"does not fit: {found.shortfall}")
        return
    table = Table("memory", "size")
    for name, size in found.plan.table():
        table.add_row(name, format_size(size))
    console.print(table)
    most, read = max(told["experts_touched_per_layer"]), format_size(int(told["bytes_read_per_step"]))
    console.print(
        f"a step of {told['tokens_per_step']} tokens touches up to {most:.0f} experts of a layer, "
        f"reads {read} and writes {format_size(int(told['bytes_written_per_step']))}"
    )
    console.print(f"a run keeps up to {format_size(told['disk_bytes'])} on the disk besides the model and its result")
    if not has_rates:
        console.print("for seconds and wear, add --hardware FILE of `expertier calibrate`")
        return
    console.print(
        f"at least {told['step_s']:.2f} s per step ({told['binds']} binds): disk {told['disk_s']:.2f} s, "
        f"products {told['compute_s']:.2f} s"
    )
    shares = told["activation_shares"]
    if shares["kept"] < 1 and any(shares.values()):
        told_shares = ", ".join(f"{share:.0%} {name}" for name, share in shares.items())
        console.print(f"of activations of micro-batches in layers: {told_shares}")
    enough = told["tokens_where_disk_no_longer_binds"]
    console.print(
        "the disk binds at every batch" if enough is None else f"from {enough} tokens per step the disk no longer binds"
    )
    console.print(f"the SSD is written to at {told['written_tb_per_day']:.2f} TB per day")
