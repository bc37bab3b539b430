"""`expertier export`, `convert`: a checkpoint as another one, of another family or architecture."""

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
    _expect_new(out)
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


@app.command()
def convert(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A checkpoint folder with experts.")],
    out: Annotated[Path, typer.Option(help="Folder to write; must not exist yet.")],
    to: Annotated[str, typer.Option("--to", help="latent: groups of experts share the projections that they read.")],
    group: Annotated[int, typer.Option("--group", min=1, help="Experts that share a basis.")],
    rank: Annotated[int, typer.Option("--rank", min=1, help="Width of the shared basis.")],
    expert_rank: Annotated[
        int | None, typer.Option("--expert-rank", min=1, help="First reduce each expert's matrices to this rank.")
    ] = None,
    whiten: Annotated[
        Path | None, typer.Option("--whiten", help="Weigh errors by the activations on this text.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="Also report the loss on this text, before and after.")
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", min=2, help="Tokens of each text, at most.")] = 4096,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the report as JSON.")] = None,
) -> None:
    """Turn a trained mixture of experts into one with latent experts, layer by layer.

    Example: `expertier convert olmoe --to latent --group 8 --rank 512 --whiten book.txt --out olmoe-latent`
    """
    if to != "latent":
        raise ValueError(f"--to must be latent; got {to!r}")
    _expect_new(out)
    _expect_parent(json_file)
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


@app.command()
def refactor(
    model: Annotated[Path, typer.Argument(metavar="DENSE_DIR", help="A small dense Llama-type checkpoint folder.")],
    data: Annotated[list[Path], typer.Option("--data", help="A text; repeat for more. Each is a domain by itself.")],
    out: Annotated[Path, typer.Option(help="Folder to write; must not exist yet.")],
    domains: Annotated[
        int | None, typer.Option("--domains", help="Group the texts' sequences into so many domains instead.")
    ] = None,
    keep: Annotated[float, typer.Option("--keep", help="Share of the hidden channels that each domain keeps.")] = 0.5,
    rounds: Annotated[int, typer.Option("--rounds", min=0, help="Rounds of router and expert steps.")] = 8,
    router_steps: Annotated[int, typer.Option("--router-steps", min=0, help="Per round.")] = 100,
    expert_steps: Annotated[int, typer.Option("--expert-steps", min=0, help="Per round.")] = 200,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Sequences per step.")] = 8,
    sequence_length: Annotated[int, typer.Option("--sequence-length", min=2, help="Tokens per sequence.")] = 256,
    tokens: Annotated[int, typer.Option("--tokens", min=4, help="Tokens of all texts, at most.")] = 65_536,
    router_width: Annotated[
        int | None, typer.Option("--router-width", help="Default: an eighth of the model's.")
    ] = None,
    router_heads: Annotated[int, typer.Option("--router-heads", min=1, help="Attention heads of the router.")] = 4,
    router_rate: Annotated[float, typer.Option("--router-rate", help="Learning rate of the router.")] = 5e-4,
    expert_rate: Annotated[float, typer.Option("--expert-rate", help="Learning rate of the experts.")] = 5e-5,
    seed: Annotated[int, typer.Option("--seed", help="Of clusters, the router's start and the order of batches.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the report as JSON.")] = None,
) -> None:
    """Cut a dense model into experts by domain, with one router over token ids for all layers (Read-ME).

    Example: `expertier refactor tiny-llama --data code.txt --data prose.txt --keep 0.5 --out tiny-experts`
    """
    _expect_new(out)
    _expect_parent(json_file)
    from rich.console import Console
    from rich.progress import Progress

    from routing.ground.files import write_json

    from .refactor import RefactorPlan
    from .refactor import refactor as run
    from .refactor_training import Rounds

    width = {} if router_width is None else {"router_width": router_width}
    plan = RefactorPlan(
        texts=tuple(data),
        domains=domains,
        keep=keep,
        sequence_length=sequence_length,
        tokens=tokens,
        rounds=Rounds(
            rounds=rounds,
            router_steps=router_steps,
            expert_steps=expert_steps,
            batch_size=batch_size,
            router_rate=router_rate,
            expert_rate=expert_rate,
            seed=seed,
        ),
        router_options={"router_heads": router_heads, **width},
    )
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("refactoring", total=rounds * (router_steps + expert_steps))
        report = run(model, out, plan, lambda: progress.advance(task))
    if json_file is not None:
        write_json(json_file, {"model": str(model), "out": str(out), **report})
    typer.echo(
        f"{out}: {report['domains']} experts; feed-forwards store {report['stored_of_dense']:.2f} and compute "
        f"{report['active_of_dense']:.2f} of the dense model's; held-out loss {report['loss_dense']:.4f} dense, "
        f"{report['loss_sliced']:.4f} sliced, {report['loss_after']:.4f} after {rounds} rounds (nats per token)"
    )


def _expect_new(out: Path) -> None:
    if out.exists():
        raise ValueError(f"{out} exists already; choose another --out")
    _expect_parent(out)


def _expect_parent(file: Path | None) -> None:
    if file is not None and not file.absolute().parent.is_dir():
        raise ValueError(f"cannot write {file}: the folder {file.absolute().parent} does not exist; create it first")
