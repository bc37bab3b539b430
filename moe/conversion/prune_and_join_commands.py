"""`expertier prune` and `expertier join`: checkpoints with fewer experts, or with those of two models."""

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from routing import RoutingTrace
from routing.ground.expect import expect_new, expect_outputs
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
    expect_new(out)
    expect_outputs(json, inputs=[folder, trace])
    from .prune_and_join import drawn, expert_layers, most_used, num_experts
    from .prune_and_join import prune as cut

    model = _load(folder)
    num_layers, E = len(list(expert_layers(model))), num_experts(model.config)
    if trace is None:
        kept = drawn(num_layers, E, keep, seed)
    else:
        found = RoutingTrace.load(trace)
        if (found.num_layers, found.num_experts) != (num_layers, E):
            raise ValueError(
                f"{trace} has {found.num_layers} layers of {found.num_experts} experts, "
                f"the model has {num_layers} of {E}"
            )
        kept = most_used(found, keep)
    _save(cut(model, kept), out)
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
    expect_new(out)
    expect_outputs(json, inputs=[first, second])
    from .prune_and_join import join as put_together
    from .prune_and_join import num_experts

    models = [_load(folder) for folder in (first, second)]
    counts = [num_experts(model.config) for model in models]
    _save(put_together(*models, backbone=backbone), out)
    if json is not None:
        write_json(json, {"num_experts": sum(counts), "from_first": counts[0], "from_second": counts[1]})
    typer.echo(f"{out}: {counts[0]} + {counts[1]} experts per layer")


def _load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is no checkpoint folder: it has no config.json")
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def _save(model: Any, out: Path) -> None:
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as staging:
        finished = Path(staging) / "checkpoint"
        model.save_pretrained(finished)
        finished.rename(out)
