"""`expertier export` and `convert`: a checkpoint as another one, of another family or architecture."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from routing.ground.expect import expect_name, expect_new, expect_outputs

ModelArgument = Annotated[Path, typer.Argument(metavar="MODEL", help="A checkpoint folder with experts.")]
OutOption = Annotated[Path, typer.Option(help="Folder to write; must not exist yet.")]
ToOption = Annotated[
    str,
    typer.Option(
        "--to",
        help="latent: groups of experts share the projections that they read. nulls: null experts are added. "
        "pregate: gates are read some layers earlier.",
    ),
]
GroupOption = Annotated[int | None, typer.Option("--group", min=1, help="latent: experts that share a basis.")]
RankOption = Annotated[int | None, typer.Option("--rank", min=1, help="latent: width of the shared basis.")]
ExpertRankOption = Annotated[
    int | None, typer.Option("--expert-rank", min=1, help="latent: first reduce each expert's matrices to this rank.")
]
WhitenOption = Annotated[
    Path | None, typer.Option("--whiten", help="latent: weigh errors by the activations on this text.")
]
NullsOption = Annotated[
    int | None, typer.Option("--nulls", min=1, help="nulls: how many, a multiple of the experts; default: as many.")
]
TopKOption = Annotated[
    int | None, typer.Option("--top-k", min=1, help="nulls: choices per token; default: what changes no first loss.")
]
AheadOption = Annotated[int, typer.Option("--ahead", min=1, help="pregate: layers from gate to experts.")]
FitOption = Annotated[Path | None, typer.Option("--fit", help="pregate: fit gates to the hidden states on this text.")]
RidgeOption = Annotated[float, typer.Option("--ridge", min=0.0, help="pregate: regularisation of the regression.")]
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
    group: GroupOption = None,
    rank: RankOption = None,
    expert_rank: ExpertRankOption = None,
    whiten: WhitenOption = None,
    nulls: NullsOption = None,
    top_k: TopKOption = None,
    ahead: AheadOption = 1,
    fit: FitOption = None,
    ridge: RidgeOption = 1e-4,
    data: DataOption = None,
    tokens: TokensOption = 4096,
    json_file: JsonOption = None,
) -> None:
    """Turn a trained mixture of experts into one with latent experts, with null experts, or with pre-gates.

    Example: `expertier convert olmoe --to latent --group 8 --rank 512 --whiten book.txt --out olmoe-latent`
    """
    expect_name(to, ("latent", "nulls", "pregate"), "target (--to)")
    expect_new(out)
    expect_outputs(json_file, inputs=[model, whiten, fit, data])
    own = {"latent": (group, rank, expert_rank, whiten), "nulls": (nulls, top_k), "pregate": (fit,)}
    if strange := [other for other, given in own.items() if other != to and any(one is not None for one in given)]:
        raise ValueError(f"an option of --to {strange[0]} was given with --to {to}; leave it out")
    from rich.console import Console
    from rich.progress import Progress

    from routing.ground.files import write_json

    from .gates.nulls import NullPlan, add_nulls
    from .gates.pregates import PreGatePlan, add_pregates
    from .latent_conversion import LatentPlan, convert_to_latent

    work: Callable[[Callable[[int, int], None]], dict[str, Any]]
    if to == "nulls":
        work = partial(add_nulls, model, out, NullPlan(nulls=nulls, top_k=top_k, data=data, tokens=tokens))
    elif to == "pregate":
        if fit is None:
            raise ValueError("pre-gates are fitted to hidden states on a text; give it with --fit")
        work = partial(
            add_pregates, model, out, PreGatePlan(fit=fit, ahead=ahead, ridge=ridge, data=data, tokens=tokens)
        )
    else:
        if group is None or rank is None:
            raise ValueError("latent experts need --group and --rank")
        plan = LatentPlan(group=group, rank=rank, expert_rank=expert_rank, whiten=whiten, data=data, tokens=tokens)
        work = partial(convert_to_latent, model, out, plan)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("converting", total=None)
        report = work(lambda done, total: progress.update(task, completed=done, total=total))
    if json_file is not None:
        write_json(json_file, {"model": str(model), "out": str(out), "to": to, **report})
    loss = "" if data is None else f"; loss {report['loss_before']:.4f} -> {report['loss_after']:.4f} nats per token"
    about = {"latent": _about_latent, "nulls": _about_nulls, "pregate": _about_pregates}[to]
    typer.echo(f"{out}: {about(report)}{loss}")


def _about_latent(report: dict[str, Any]) -> str:
    return (
        f"{report['parameters_after']:,} of {report['parameters_before']:,} parameters, "
        f"gate and up projections {report['relative_error']:.3%} off"
    )


def _about_pregates(report: dict[str, Any]) -> str:
    return f"gates read {report['ahead']} layers ahead name {report['agreement']:.1%} of the ordinary gates' choices"


def _about_nulls(report: dict[str, Any]) -> str:
    where = "everywhere" if report["first_loss_unchanged"] else "on a CPU"
    same = report["first_loss_unchanged"] or report["first_loss_unchanged_on_cpu"]
    return (
        f"{report['nulls']} nulls beside {report['num_experts']} experts, {report['num_experts_per_tok']} choices per "
        f"token; first loss {f'unchanged {where}' if same else 'changed'}, balanced load {report['balanced_load']:.2f}"
    )
