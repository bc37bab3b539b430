"""`expertier bench duo`: a Duo-LLM's oracle against its trained router, at several budgets of big modules.

No parity gate: losses are compared, not times. Tests hold the search against every route of a small model.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from routing.ground.expect import expect_not_an_input, expect_outputs

from ..listed import listed

if TYPE_CHECKING:
    from torch import Tensor

    from moe import MoEForCausalLM

    from ...train.corpus import Corpus
    from ...train.description.config import TrainConfig

# Of the loss that holds the router to its budget, ten times the architecture's default: stage 3 has only a few hundred
# steps to reach the budget. It trades nearness to the budget against the language model's loss; no other was tried.
BUDGET_WEIGHT = 10.0


@dataclass(frozen=True, kw_only=True)
class DuoScale:
    """How much is trained and searched.

    Args:
        router_steps: optimiser steps of stage 3, per budget.
        sequences, positions: of held-out text that routes are compared on.
        random_routings: routings of the text at random, of which mean and best are reported.
        beam: width of a beam search that is compared with the exact one.
    """

    router_steps: int = 150
    sequences: int = 8
    positions: int = 64
    random_routings: int = 100
    beam: int = 4


def bench_duo(
    out: Annotated[Path, typer.Option(help="Folder of the stage-1 run; call again to use it as it is.")],
    data: Annotated[
        str | None, typer.Option(help="Text file, folder, .jsonl or .parquet; the standard library without it.")
    ] = None,
    preset_name: Annotated[str, typer.Option("--preset", help="Sizes of the model.")] = "routers",
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps of stage 1.")] = 800,
    router_steps: Annotated[int, typer.Option(min=1, help="Optimiser steps of stage 3, per budget.")] = 150,
    budgets: Annotated[str, typer.Option(help="Big layers per token, with commas between them.")] = "2,4,6",
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the report there.")] = None,
    record: Annotated[bool, typer.Option("--record", help="Keep the report under experiments/records.")] = False,
) -> None:
    """Train big and small modules at random, search the best route of every token, train a router, compare them.

    Example: `expertier bench duo --steps 200 --budgets 2,4 --out runs/duo`
    """
    from routing.ground.files import write_json

    from ...evidence.record import save_record
    from ...train.corpus import load_corpus
    from ...train.presets import preset

    expect_outputs(json_file, inputs=[data])
    expect_not_an_input(out, *([Path(data)] if data else []))
    wanted = listed(budgets, "--budgets", least=0)
    base = preset(preset_name)
    base = replace(base, steps=steps, warmup_steps=min(base.warmup_steps, steps))
    scale = DuoScale(router_steps=router_steps)
    rows = duo_report(base, load_corpus(data), out, wanted, scale)
    print_rows(rows)
    if json_file:
        write_json(json_file, {"rows": rows})
    if record:
        config = {"preset": preset_name, "steps": steps, "budgets": wanted, "scale": vars(scale), "data": data}
        typer.echo(f"record: {save_record('duo-oracle', rows, config=config, seed=base.seed)}")


def duo_report(
    base: "TrainConfig", corpus: "Corpus", out: Path, budgets: list[int], scale: DuoScale
) -> list[dict[str, Any]]:
    """One row per way of choosing routes.

    Args:
        base: sizes and training of stage 1; the architecture becomes `duo_llm`.
        corpus: text to train on, and its held-out part to compare routes on.
        out: folder of the stage-1 run.
        budgets: big layers per token.
        scale: how much is trained and searched.
    """
    import torch

    from ...train.corpus import windows

    model = stage_one(base, corpus, out)
    rows = windows(corpus.held_out, scale.positions)[: scale.sequences]
    token_BS = torch.from_numpy(rows.astype("int64"))
    layers = len(model.model.routers)
    report = [_row("all big", layers, _constant_loss(model, token_BS, 0), 1.0)]
    report.append(_row("all small", 0, _constant_loss(model, token_BS, 1), 0.0))
    for num_big in budgets:
        report += _searched(model, token_BS, num_big, scale)
        report += _random(model, token_BS, num_big, scale.random_routings)
        report.append(_routed(base, corpus, out, token_BS, num_big / layers, num_big, scale))
    return report


def stage_one(base: "TrainConfig", corpus: "Corpus", out: Path) -> "MoEForCausalLM":
    """The model trained with modules drawn at random, from `out` if it is there already."""
    from moe import MoEForCausalLM

    from ...train.checkpoint import checkpoints
    from ...train.torch_run import train

    run = out / "stage1"
    if not (run / "result.json").is_file():
        train(_with_stage(base, "random"), corpus, run, resume=bool(checkpoints(run)))
    return MoEForCausalLM.from_pretrained(run).eval()


def train_router(base: "TrainConfig", corpus: "Corpus", out: Path, budget: float, steps: int) -> "MoEForCausalLM":
    """Stage 3: the router alone, on the frozen weights of stage 1, mixing modules softly; hardened to the end."""
    import torch

    from moe import MoEConfig, MoEForCausalLM

    from ...train.corpus import BatchOrder, windows
    from ...train.torch_run import build_optimizer, train_step

    options = {"budget": budget, "budget_weight": BUDGET_WEIGHT, "final_temperature": 0.1, "temperature_steps": steps}
    config = replace(_with_stage(base, "router", **options), steps=steps, warmup_steps=1, precision="float32")
    torch.manual_seed(config.seed)
    settings = {"vocab_size": corpus.vocab_size} | config.model
    model = MoEForCausalLM.from_pretrained(out / "stage1", config=MoEConfig(**settings)).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".router." in name)
    optimizer = build_optimizer(model, config)
    order = BatchOrder(windows(corpus.train, config.sequence_length), config.batch_size, config.seed + 1)
    for step in range(steps):
        train_step(model, optimizer, order, config, step)
    return model.eval()


def print_rows(rows: list[dict[str, Any]]) -> None:
    """The report as a table."""
    from rich.table import Table

    from routing.ground.terminal import plain_console

    table = Table("routes", "big layers", "nats/token", "share of big", "share of big per layer")
    for row in rows:
        table.add_row(
            row["routes"], str(row["num_big"]), f"{row['nats']:.4f}", f"{row['share_big']:.3f}", row["share_per_layer"]
        )
    plain_console().print(table)


def _searched(model: "MoEForCausalLM", token_BS: "Tensor", num_big: int, scale: DuoScale) -> list[dict[str, Any]]:
    from .oracle import oracle_routes

    searches = {
        "oracle": {"history": "oracle"},
        "oracle, big history": {"history": "big"},
        f"oracle, beam of {scale.beam}": {"history": "oracle", "beam": scale.beam},
    }
    rows = []
    for name, options in searches.items():
        found = oracle_routes(model, token_BS, num_big, **options)
        is_big_TL = (found.route_BSL == 0).flatten(0, 1).double()
        rows.append(_row(name, num_big, found.loss_BS.mean().item(), is_big_TL.mean().item(), is_big_TL.mean(dim=0)))
    return rows


def _random(model: "MoEForCausalLM", token_BS: "Tensor", num_big: int, count: int) -> list[dict[str, Any]]:
    """Exactly `num_big` layers at random for every token."""
    import torch

    from .oracle import route_loss

    generator, layers = torch.Generator().manual_seed(0), len(model.model.routers)
    losses = []
    for _ in range(count):
        rank_BSL = torch.rand(*token_BS.shape, layers, generator=generator).argsort(dim=-1).argsort(dim=-1)
        losses.append(route_loss(model, token_BS, (rank_BSL >= num_big).long()))
    mean, share = sum(losses) / count, num_big / layers
    return [
        _row(f"random, mean of {count}", num_big, mean, share),
        _row(f"random, best of {count}", num_big, min(losses), share),
    ]


def _routed(
    base: "TrainConfig",
    corpus: "Corpus",
    out: Path,
    token_BS: "Tensor",
    budget: float,
    num_big: int,
    scale: DuoScale,
) -> dict[str, Any]:
    import torch

    model = train_router(base, corpus, out, budget, scale.router_steps)
    with torch.no_grad():
        output = model(token_BS, labels=token_BS, use_cache=False)
    share_L = torch.stack([stats.count_R[0] / stats.num_tokens for stats in output.router_stats])
    return _row("router", num_big, output.lm_loss.item(), share_L.mean().item(), share_L)


def _constant_loss(model: "MoEForCausalLM", token_BS: "Tensor", module: int) -> float:
    import torch

    from .oracle import route_loss

    return route_loss(model, token_BS, torch.full((*token_BS.shape, len(model.model.routers)), module))


def _with_stage(base: "TrainConfig", stage: str, **options: Any) -> "TrainConfig":
    """The preset with two modules per layer, the big one as wide as the preset's active experts twice over."""
    width = 2 * base.model["moe_intermediate_size"] * base.model.get("num_experts_per_tok", 2)
    own = {"architecture": "duo_llm", "architecture_options": {"stage": stage, **options}, "intermediate_size": width}
    return replace(base, model=base.model | own)


def _row(routes: str, num_big: int, nats: float, share: float, share_L: Any = None) -> dict[str, Any]:
    per_layer = "" if share_L is None else " ".join(f"{value:.2f}" for value in share_L.tolist())
    return {"routes": routes, "num_big": num_big, "nats": nats, "share_big": share, "share_per_layer": per_layer}
