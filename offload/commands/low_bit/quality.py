"""`expertier quality`: how much worse one model is than another, on a text."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from routing.ground.expect import expect_outputs
from routing.ground.files import write_json
from routing.ground.quantity import parse_size
from routing.ground.terminal import plain_console

from ..options import CacheExperts, CpuMemory, Depth, JsonFile, Model, Pack, expect_model, quiet_transformers

if TYPE_CHECKING:
    from ...quality.quality import Quality


def quality(
    model: Model,
    against: Annotated[str, typer.Option("--against", help="The reference: a model folder or id.")],
    data: Annotated[Path, typer.Option("--data", help="A text file, or a folder of text files.")],
    pack: Pack = None,
    depth: Depth = "all",
    against_pack: Annotated[
        Path | None, typer.Option("--against-pack", help="Read the reference's experts from this file.")
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", min=2, help="Tokens to read; no more text is read.")] = 4096,
    length: Annotated[int, typer.Option("--length", min=2, help="Tokens per sequence.")] = 256,
    cpu_memory: CpuMemory = "auto",
    cache_experts: CacheExperts = None,
    scratch: Annotated[
        Path | None, typer.Option("--scratch", help="Folder for the reference's logits while this runs.")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Compare a model with a reference: loss, greedy tokens, divergence, and the errors of layers and experts.

    Both run offloaded, one after the other, so that one budget is enough for either.

    Example: `expertier quality my-model --pack my-model.int4 --against my-model --data book.txt`
    """
    for name in (model, against):
        expect_model(name)
    expect_outputs(json_file, inputs=[model, against, data, pack, against_pack])
    if cpu_memory != "auto":
        parse_size(cpu_memory)
    for file in (pack, against_pack):
        if file is not None and not file.is_file():
            raise ValueError(f"pack {file}: no such file")
    from rich.progress import Progress

    with Progress(console=plain_console(stderr=True), transient=True) as progress:
        task = progress.add_task("reading the models", total=1.0)
        from ...quality.quality import Contestant
        from ...quality.quality import quality as judge

        quiet_transformers()
        found = judge(
            Contestant(path_or_id=model, pack=pack, depth=depth, cpu_memory=cpu_memory, cache_experts=cache_experts),
            Contestant(path_or_id=against, pack=against_pack, cpu_memory=cpu_memory, cache_experts=cache_experts),
            data,
            tokens=tokens,
            length=length,
            scratch=scratch,
            progress=lambda what, share: progress.update(task, description=what, completed=share),
        )
    _show(found)
    if json_file:
        write_json(json_file, {"model": model, "against": against, **found.as_json()})


def _show(found: "Quality") -> None:
    seen, console = found.predictions, plain_console(soft_wrap=True)
    within = "one sequence, no interval" if seen.interval is None else "{:+.4f} to {:+.4f}".format(*seen.interval)
    table = Table("of the model", "value")
    table.add_row("loss, nats per token", f"{seen.loss:.4f}, the reference's is {seen.reference_loss:.4f}")
    table.add_row("difference, 95 %", f"{seen.loss_difference:+.4f}, {within}")
    table.add_row("same greedy token", f"{seen.agreement:.2%} of {seen.tokens}")
    table.add_row("divergence, nats per token", f"{seen.divergence:.5f}, at worst {seen.worst_divergence:.4f}")
    table.add_row("stored bits per expert weight", "{1:.2f}, the reference's {0:.2f}".format(*found.expert_bits))
    console.print(table)
    if found.layers is None:
        console.print("the models have experts of other shapes, so these are not compared one by one")
        return
    table = Table("layer", "squared error of experts", "worst expert", "experts never reached")
    for number, layer in enumerate(found.layers):
        reached = [(error, expert) for expert, error in enumerate(layer.error_E) if error is not None]
        worst = "{1}: {0:.5f}".format(*max(reached)) if reached else "-"
        table.add_row(str(number), f"{layer.error:.5f}", worst, str(len(layer.error_E) - len(reached)))
    console.print(table)
