"""`expertier refactor`: a dense model cut into experts by domain."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from routing.ground.expect import expect_new, expect_outputs

if TYPE_CHECKING:
    from .refactor import RefactorPlan


ModelArgument = Annotated[Path, typer.Argument(metavar="DENSE_DIR", help="A small dense Llama-type checkpoint folder.")]
DataOption = Annotated[list[Path], typer.Option("--data", help="A text; repeat for more. Each is a domain by itself.")]
OutOption = Annotated[Path, typer.Option(help="Folder to write; must not exist yet.")]
DomainsOption = Annotated[
    int | None, typer.Option("--domains", help="Group the texts' sequences into so many domains instead.")
]
KeepOption = Annotated[float, typer.Option("--keep", help="Share of the hidden channels that each domain keeps.")]
RoundsOption = Annotated[int, typer.Option("--rounds", min=0, help="Rounds of router and expert steps.")]
RouterStepsOption = Annotated[int, typer.Option("--router-steps", min=0, help="Per round.")]
ExpertStepsOption = Annotated[int, typer.Option("--expert-steps", min=0, help="Per round.")]
BatchSizeOption = Annotated[int, typer.Option("--batch-size", min=1, help="Sequences per step.")]
SequenceLengthOption = Annotated[int, typer.Option("--sequence-length", min=2, help="Tokens per sequence.")]
TokensOption = Annotated[int, typer.Option("--tokens", min=4, help="Tokens of all texts, at most.")]
RouterWidthOption = Annotated[int | None, typer.Option("--router-width", help="Default: an eighth of the model's.")]
RouterHeadsOption = Annotated[int, typer.Option("--router-heads", min=1, help="Attention heads of the router.")]
RouterRateOption = Annotated[float, typer.Option("--router-rate", help="Learning rate of the router.")]
ExpertRateOption = Annotated[float, typer.Option("--expert-rate", help="Learning rate of the experts.")]
SeedOption = Annotated[int, typer.Option("--seed", help="Of clusters, the router's start and the order of batches.")]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Also write the report as JSON.")]


def refactor(
    model: ModelArgument,
    data: DataOption,
    out: OutOption,
    domains: DomainsOption = None,
    keep: KeepOption = 0.5,
    rounds: RoundsOption = 8,
    router_steps: RouterStepsOption = 100,
    expert_steps: ExpertStepsOption = 200,
    batch_size: BatchSizeOption = 8,
    sequence_length: SequenceLengthOption = 256,
    tokens: TokensOption = 65_536,
    router_width: RouterWidthOption = None,
    router_heads: RouterHeadsOption = 4,
    router_rate: RouterRateOption = 5e-4,
    expert_rate: ExpertRateOption = 5e-5,
    seed: SeedOption = 0,
    json_file: JsonOption = None,
) -> None:
    """Cut a dense model into experts by domain, with one router over token ids for all layers (Read-ME).

    Example: `expertier refactor tiny-llama --data code.txt --data prose.txt --keep 0.5 --out tiny-experts`
    """
    expect_new(out)
    expect_outputs(json_file, inputs=[model, *data])
    from .refactor import RefactorPlan
    from .training import Rounds

    schedule = Rounds(
        rounds=rounds, router_steps=router_steps, expert_steps=expert_steps, batch_size=batch_size,
        router_rate=router_rate, expert_rate=expert_rate, seed=seed,
    )  # fmt: skip
    width = {} if router_width is None else {"router_width": router_width}
    plan = RefactorPlan(
        texts=tuple(data), domains=domains, keep=keep, sequence_length=sequence_length, tokens=tokens,
        rounds=schedule, router_options={"router_heads": router_heads, **width},
    )  # fmt: skip
    _refactor(model, out, plan, json_file)


def _refactor(model: Path, out: Path, plan: "RefactorPlan", json_file: Path | None) -> None:
    from rich.console import Console
    from rich.progress import Progress

    from routing.ground.files import write_json

    from .refactor import refactor as run

    schedule = plan.rounds
    with Progress(console=Console(stderr=True), transient=True) as progress:
        total = schedule.rounds * (schedule.router_steps + schedule.expert_steps)
        task = progress.add_task("refactoring", total=total)
        report = run(model, out, plan, lambda: progress.advance(task))
    if json_file is not None:
        write_json(json_file, {"model": str(model), "out": str(out), **report})
    typer.echo(
        f"{out}: {report['domains']} experts; feed-forwards store {report['stored_of_dense']:.2f} and compute "
        f"{report['active_of_dense']:.2f} of the dense model's; held-out loss {report['loss_dense']:.4f} dense, "
        f"{report['loss_sliced']:.4f} sliced, {report['loss_after']:.4f} after {schedule.rounds} rounds "
        "(nats per token)"
    )
