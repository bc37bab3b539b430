"""`expertier trace neurons`: how sparse the hidden units of a model's feed-forwards are."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from routing.ground.expect import expect_outputs
from routing.ground.files import write_json
from routing.ground.terminal import plain_console

from ..options import JsonFile, Model, expect_model, quiet_transformers


def neurons(
    model: Model,
    data: Annotated[Path, typer.Option("--data", help="A text file, or a folder of text files.")],
    tokens: Annotated[int, typer.Option("--tokens", min=2, help="Tokens to run; no more text is read.")] = 1024,
    length: Annotated[int, typer.Option("--length", min=2, help="Tokens per sequence.")] = 256,
    rise: Annotated[float, typer.Option("--rise", help="How much perplexity may rise, as a share.")] = 0.01,
    json_file: JsonFile = None,
) -> None:
    """Say how many hidden units of the feed-forwards are zero, and how many could be left out (PPL-p % sparsity).

    Where units are not exactly zero it says so: reading active units alone would not be the same model. It says so,
    too, where units are so short that a disk's pages bring most of the others along. Of experts, only those that a
    token visits count. The whole model is held in memory.

    Example: `expertier trace neurons my-model --data book.txt`
    """
    expect_model(model)
    expect_outputs(json_file, inputs=[model, data])
    if not 0 < rise <= 1:
        raise ValueError(f"--rise is a share above 0 and at most 1; got {rise:g}")
    from rich.progress import Progress

    with Progress(console=plain_console(stderr=True), transient=True) as progress:
        task = progress.add_task(f"reading {model}", total=1.0)
        from ...checkpoint.location import local_folder
        from ...quality.unit_sparsity import open_eager, unit_sparsity
        from ...serve.corpus import sequences, text_files
        from ...serve.text import open_text

        text_files(data)
        quiet_transformers()
        folder = local_folder(model)
        pieces = [piece for piece in sequences(data, open_text(folder), length, tokens) if len(piece) > 1]
        found = unit_sparsity(
            open_eager(folder),
            pieces,
            allowed=rise,
            progress=lambda share: progress.update(task, completed=share, description="running"),
        )
    console = plain_console(soft_wrap=True)
    console.print(f"exact zeros by layer: {', '.join(f'{share:.3f}' for share in found.zeros_L)}")
    console.print(
        f"PPL-{rise:.0%} sparsity {found.sparsity:.3f}: perplexity {found.perplexity:.3f}, "
        f"{found.sparse_perplexity:.3f} without those units, over {found.tokens} tokens"
    )
    console.print(found.verdict)
    if json_file:
        derived = {name: getattr(found, name) for name in ("zeros", "read_share", "is_worthwhile")}
        write_json(json_file, {**asdict(found), **derived})
