"""`expertier prune` and `expertier join`: checkpoints with fewer experts, or with those of two models."""

from pathlib import Path
from typing import Annotated, Any

import typer

from routing import RoutingTrace
from routing.ground.expect import expect_name, expect_new, expect_outputs
from routing.ground.files import write_json

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint folder of a mixture-of-experts model.")]
Out = Annotated[Path, typer.Option(help="Folder to write; must not exist yet.")]
Report = Annotated[Path | None, typer.Option("--json", help="Write what was kept or joined to this file.")]


def prune(
    folder: Folder,
    keep: Annotated[int, typer.Option(help="Experts to keep in each layer.", min=1)],
    out: Out,
    trace: Annotated[Path | None, typer.Option(help="Keep those that this routing trace uses most.")] = None,
    seed: Annotated[int, typer.Option(help="Without a trace, keep random ones, drawn with this seed.")] = 0,
    json: Report = None,
) -> None:
    """Keep some experts of each layer and their rows of the router; fine-tune the result shortly.

    Example: `expertier prune runs/tiny --keep 8 --trace tiny.npz --out runs/tiny-8`
    """
    expect_checkpoints(folder)
    expect_new(out)
    expect_outputs(json, inputs=[folder, trace])
    from .prune_and_join import drawn, expert_layers, most_used, num_experts
    from .prune_and_join import prune as cut

    found = None if trace is None else RoutingTrace.load(trace)
    model = load(folder)
    num_layers, E = len(list(expert_layers(model))), num_experts(model.config)
    if found is None:
        kept = drawn(num_layers, E, keep, seed)
    else:
        if (found.num_layers, found.num_experts) != (num_layers, E):
            raise ValueError(
                f"{trace} has {found.num_layers} layers of {found.num_experts} experts, "
                f"the model has {num_layers} of {E}"
            )
        kept = most_used(found, keep)
    save_beside(cut(model, kept), folder, out)
    if json is not None:
        write_json(json, {"num_experts": E, "kept": kept.tolist()})
    typer.echo(f"{out}: {keep} of {E} experts in each of {num_layers} layers")


def join(
    first: Folder,
    second: Folder,
    out: Out,
    backbone: Annotated[str, typer.Option(help="The rest of the weights: same, first, second or mean.")] = "same",
    json: Report = None,
) -> None:
    """Put the experts and router rows of two checkpoints of one backbone beside each other.

    Example: `expertier join runs/a runs/b --backbone mean --out runs/joined`
    """
    expect_checkpoints(first, second)
    expect_new(out)
    expect_outputs(json, inputs=[first, second])
    expect_name(backbone, ("same", "first", "second", "mean"), "backbone")
    expect_one_tokenizer(first, second)
    from .prune_and_join import join as put_together
    from .prune_and_join import num_experts

    models = [load(folder) for folder in (first, second)]
    counts = [num_experts(model.config) for model in models]
    save_beside(put_together(*models, backbone=backbone), first, out)
    if json is not None:
        write_json(json, {"num_experts": sum(counts), "from_first": counts[0], "from_second": counts[1]})
    typer.echo(f"{out}: {counts[0]} + {counts[1]} experts per layer")


def expect_checkpoints(*folders: Path) -> None:
    """Raises ValueError if one is no checkpoint folder."""
    for folder in folders:
        if not (folder / "config.json").is_file():
            raise ValueError(f"{folder} is no checkpoint folder: it has no config.json")


def expect_one_tokenizer(first: Path, *others: Path) -> None:
    """Raises ValueError if two folders have different tokenizers."""
    for other in others:
        files = [folder / "tokenizer.json" for folder in (first, other)]
        if all(file.is_file() for file in files) and files[0].read_bytes() != files[1].read_bytes():
            raise ValueError(f"{first} and {other} have different tokenizers; they must read the same ids")


def load(folder: Path) -> Any:
    """The model of a folder, in the dtype of its checkpoint."""
    from .opening import load_model

    return load_model(folder, dtype="auto")


def save_beside(model: Any, folder: Path, out: Path) -> None:
    """Write the model to a new folder, with the text files of the folder that it was made of."""
    from ..parts.text import carry_text_files
    from .staging import staged_folder

    is_ours = model.config.model_type == "expertier"
    with staged_folder(out) as unfinished:
        model.save_pretrained(unfinished)
        carry_text_files(folder, unfinished, vocab_size=model.config.vocab_size if is_ours else None)
