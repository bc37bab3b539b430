"""`expertier export` and `convert`: a checkpoint as another one, of another family or architecture."""

from pathlib import Path
from typing import Annotated

import typer

from routing.ground.expect import expect_name, expect_new, expect_outputs

ModelArgument = Annotated[Path, typer.Argument(metavar="MODEL", help="A checkpoint folder with experts.")]
OutOption = Annotated[Path, typer.Option(help="Folder to write; must not exist yet.")]
ToOption = Annotated[str, typer.Option("--to", help="latent: groups of experts share the projections that they read.")]
GroupOption = Annotated[int, typer.Option("--group", min=1, help="Experts that share a basis.")]
RankOption = Annotated[int, typer.Option("--rank", min=1, help="Width of the shared basis.")]
ExpertRankOption = Annotated[
    int | None, typer.Option("--expert-rank", min=1, help="First reduce each expert's matrices to this rank.")
]
WhitenOption = Annotated[Path | None, typer.Option("--whiten", help="Weigh errors by the activations on this text.")]
DataOption = Annotated[Path | None, typer.Option("--data", help="Also report the loss on this text, before and after.")]
TokensOption = Annotated[int, typer.Option("--tokens", min=2, help="Tokens of each text, at most.")]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Also write the report as JSON.")]


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
    expect_new(out)
    expect_name(family, ("olmoe", "qwen3_moe", "mixtral"), "family")
    from ..model.decoder import MoEForCausalLM
    from ..parts.text import carry_text_files
    from .export import export as convert
    from .opening import read_config
    from .staging import staged_folder

    found = read_config(folder).model_type
    if found != "expertier":
        raise ValueError(f"{folder} holds a {found} model; only models trained here (expertier) are exported")
    model = convert(MoEForCausalLM.from_pretrained(folder), family)
    with staged_folder(out) as unfinished:
        model.save_pretrained(unfinished)
        carry_text_files(folder, unfinished, vocab_size=model.config.vocab_size)
    typer.echo(f"{out}: {family}, {sum(p.numel() for p in model.parameters()):,} parameters")


def convert(
    model: ModelArgument,
    out: OutOption,
    to: ToOption,
    group: GroupOption,
    rank: RankOption,
    expert_rank: ExpertRankOption = None,
    whiten: WhitenOption = None,
    data: DataOption = None,
    tokens: TokensOption = 4096,
    json_file: JsonOption = None,
) -> None:
    """Turn a trained mixture of experts into one with latent experts, layer by layer.

    Example: `expertier convert olmoe --to latent --group 8 --rank 512 --whiten book.txt --out olmoe-latent`
    """
    expect_name(to, ("latent",), "target (--to)")
    expect_new(out)
    expect_outputs(json_file, inputs=[model, whiten, data])
    from rich.console import Console
    from rich.progress import Progress

    from routing.ground.files import write_json

    from .latent_conversion import LatentPlan, convert_to_latent

    plan = LatentPlan(group=group, rank=rank, expert_rank=expert_rank, whiten=whiten, data=data, tokens=tokens)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("converting", total=None)
        report = convert_to_latent(
            model, out, plan, lambda done, total: progress.update(task, completed=done, total=total)
        )
    if json_file is not None:
        write_json(json_file, {"model": str(model), "out": str(out), **report})
    typer.echo(
        f"{out}: {report['parameters_after']:,} of {report['parameters_before']:,} parameters, "
        f"gate and up projections {report['relative_error']:.3%} off"
        + ("" if data is None else f"; loss {report['loss_before']:.4f} -> {report['loss_after']:.4f} nats per token")
    )
