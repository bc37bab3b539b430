"""`expertier export`: write a checkpoint that other engines load."""

import tempfile
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(pretty_exceptions_enable=False)


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint folder of ours.")],
    family: Annotated[str, typer.Option("--to", help="olmoe, qwen3_moe or mixtral.")],
    out: Annotated[Path, typer.Option(help="Folder to write; must not exist yet.")],
) -> None:
    """Write a trained model as a native transformers family, so that other engines load it unchanged.

    Example: `expertier export runs/tiny --to qwen3_moe --out runs/tiny-qwen3`
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is no checkpoint folder: it has no config.json")
    if out.exists():
        raise ValueError(f"{out} exists already; choose another --out")
    if not out.parent.is_dir():
        raise ValueError(f"cannot write {out}: the folder {out.parent} does not exist; create it first")
    from transformers import AutoConfig

    from .decoder import MoEForCausalLM
    from .export import export as convert

    found = AutoConfig.from_pretrained(folder).model_type
    if found != "expertier":
        raise ValueError(f"{folder} holds a {found} model; only models trained here (expertier) are exported")
    model = convert(MoEForCausalLM.from_pretrained(folder), family)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as staging:
        finished = Path(staging) / "checkpoint"
        model.save_pretrained(finished)
        finished.rename(out)
    typer.echo(f"{out}: {family}, {sum(p.numel() for p in model.parameters()):,} parameters")
