"""`expertier bench train`: our training step against that of a Mixtral of the same sizes in transformers."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from routing.ground.expect import expect_name
from routing.ground.terminal import plain_console

from ..evidence.record import RECORDS, expect_records, save_record

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..train.description.config import TrainConfig

PRECISIONS = ("float32", "bfloat16")
OURS, THEIRS = "expertier", "transformers Mixtral, grouped_mm"
# the first steps allocate and compile; they are run and not timed
WARM_UP_STEPS = 3
# bytes, as the trainer's corpus has
VOCABULARY = 256
# of the weights and, counted on, of each step's tokens, so that both models see the same
SEED = 0
# relative norm of the logits' difference: of float32 rounding, and of bfloat16 rounding through 8 layers
BOUNDS = {"float32": 1e-4, "bfloat16": 5e-2}
# what ours has and Mixtral has not; everything else must be there in both
OURS_ALONE = ("q_norm", "k_norm")


def bench_train(
    preset: Annotated[str, typer.Option(help="Sizes of model and batch.")] = "e16",
    repeats: Annotated[int, typer.Option(min=5, help="Timed steps of each contestant.")] = 15,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
    precision: Annotated[list[str] | None, typer.Option(help="float32 or bfloat16; both without it.")] = None,
    record: Annotated[bool, typer.Option("--record", help="Keep the result under experiments/records.")] = False,
    records: Annotated[Path, typer.Option(help="Where records live.")] = RECORDS,
) -> None:
    """Time training steps (forward, backward, optimiser) against transformers' Mixtral with the same sizes.

    Ours is the trainer's own step, with both balance losses and metrics; theirs is the bare loop with its balance loss,
    and the same fused AdamW and gradient clipping. Steps take turns, and both get the same tokens.

    Example: `expertier bench train --preset e16 --repeats 20 --record`
    """
    expect_records(records)
    for name in precision or ():
        expect_name(name, PRECISIONS, "precision")
    from ..train.presets import preset as preset_named

    rows = measure(preset_named(preset), repeats, threads, precision or PRECISIONS)
    table = Table("precision", "variant", "tokens/s", "p20", "p80", "parameters", "times Mixtral in this precision")
    for row in rows:
        rates = (f"{row[name]:.0f}" for name in ("tokens_per_s_p50", "tokens_per_s_p20", "tokens_per_s_p80"))
        table.add_row(row["precision"], row["variant"], *rates, f"{row['parameters']:,}", f"{row['ratio']:.2f}")
    console = plain_console()
    console.print(table)
    console.print(f"best of ours / best of theirs: {_best(rows, OURS) / _best(rows, THEIRS):.2f}", highlight=False)
    if record:
        config = {"preset": preset, "repeats": repeats, "threads": threads, "only_in_ours": OURS_ALONE}
        typer.echo(f"record: {save_record('training-throughput', rows, config=config, seed=SEED, folder=records)}")


def _best(rows: list[dict[str, Any]], variant: str) -> float:
    return max(row["tokens_per_s_p50"] for row in rows if row["variant"] == variant)


def measure(config: "TrainConfig", repeats: int, threads: int, precisions: tuple[str, ...]) -> list[dict[str, Any]]:
    """Tokens per second of each contestant in each precision.

    Args:
        config: a preset.
        repeats: timed steps of each.
        threads: CPU threads of torch, set back afterwards.
        precisions: which number formats to compare in.

    Returns:
        One row per precision and contestant; `ratio` is the median over steps of their seconds through its own.

    Raises:
        ValueError: if the preset's model has no Mixtral of the same sizes.
        RuntimeError: if parameters or logits of the two differ.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        rows = []
        for precision in precisions:
            require_same_function(config, precision)
            rows += _measured_in(config, precision, repeats)
        return rows
    finally:
        torch.set_num_threads(before)


def _measured_in(config: "TrainConfig", precision: str, repeats: int) -> list[dict[str, Any]]:
    from dataclasses import replace

    config = replace(config, precision=precision)
    ours = _build_ours(config).train()
    theirs = _as_mixtral(_build_ours(config, **PLAIN)).train()
    parameters = {OURS: _count(ours), THEIRS: _count(theirs)}
    if parameters[OURS] != parameters[THEIRS]:
        raise RuntimeError(f"the two models have different sizes, so no time is printed: {parameters}")
    steps = {THEIRS: _mixtral_step(theirs, config), OURS: _trainer_step(ours, config)}
    samples_s: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(WARM_UP_STEPS + repeats):
        for name in list(steps)[:: -1 if number % 2 else 1]:
            start = time.perf_counter()
            steps[name](number)
            if number >= WARM_UP_STEPS:
                samples_s[name].append(time.perf_counter() - start)
    tokens = config.batch_size * config.sequence_length * config.accumulation
    return [
        _row(name, precision, samples, samples_s[THEIRS], tokens, parameters[name])
        for name, samples in samples_s.items()
    ]


# settings under which ours and Mixtral are the same function
PLAIN = {"router": "mixtral", "qk_norm": "none"}


def _build_ours(config: "TrainConfig", **changes: Any) -> "nn.Module":
    import torch

    from moe import MoEConfig, MoEForCausalLM

    torch.manual_seed(SEED)
    return MoEForCausalLM(MoEConfig(**({"vocab_size": VOCABULARY} | config.model | changes)))


def _as_mixtral(model: "nn.Module") -> "nn.Module":
    """The same weights in transformers' class, whose experts are computed by its own grouped products."""
    from transformers import MixtralForCausalLM

    from moe import export

    exported = export(model, "mixtral")
    config = exported.config
    config.output_router_logits, config.use_cache = True, False
    config.router_aux_loss_coef = model.config.balance_loss_weight
    mixtral = MixtralForCausalLM(config)
    mixtral.load_state_dict(exported.state_dict())
    mixtral.set_experts_implementation("grouped_mm")
    return mixtral


def _count(model: "nn.Module") -> int:
    """Parameters, without those that only ours has."""
    return sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if not any(part in OURS_ALONE for part in name.split("."))
    )


def require_same_function(config: "TrainConfig", precision: str) -> None:
    """Ours with Mixtral's router and without query and key norms must compute what Mixtral computes.

    Raises:
        RuntimeError: if the logits differ by more than rounding.
    """
    import torch

    from ..train.torch_run import autocast

    ours = _build_ours(config, **PLAIN).eval()
    theirs = _as_mixtral(_build_ours(config, **PLAIN)).eval()
    token_BS = _tokens(config, 0)[:2]
    with torch.no_grad(), autocast(precision, torch.device("cpu")):
        found, wanted = (model(token_BS).logits.float() for model in (ours, theirs))
    error = ((found - wanted).norm() / wanted.norm()).item()
    if not error <= BOUNDS[precision]:
        raise RuntimeError(
            f"parity is red, so no time is printed: in {precision} the logits differ by {error:.1e} (relative norm); "
            f"at most {BOUNDS[precision]:.0e} is allowed"
        )


def _tokens(config: "TrainConfig", number: int) -> "Tensor":
    import torch

    generator = torch.Generator().manual_seed(SEED + number)
    return torch.randint(VOCABULARY, (config.batch_size, config.sequence_length), generator=generator)


class _Batches:
    """The order of batches, as the trainer wants it."""

    def __init__(self, config: "TrainConfig") -> None:
        self.config = config

    def batch(self, number: int) -> Any:
        return _tokens(self.config, number).numpy()


def _trainer_step(model: "nn.Module", config: "TrainConfig") -> Callable[[int], object]:
    from ..train.torch_run import build_optimizer, train_step

    optimizer, order = build_optimizer(model, config), _Batches(config)
    return lambda number: train_step(model, optimizer, order, config, number)


def _mixtral_step(model: "nn.Module", config: "TrainConfig") -> Callable[[int], object]:
    import torch

    from ..train.torch_run import autocast, build_optimizer

    optimizer = build_optimizer(model, config)

    def step(number: int) -> None:
        for micro in range(config.accumulation):
            token_BS = _tokens(config, number * config.accumulation + micro)
            with autocast(config.precision, token_BS.device):
                loss = model(token_BS, labels=token_BS).loss
            (loss / config.accumulation).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _row(
    name: str, precision: str, samples_s: list[float], base_s: list[float], tokens: int, parameters: int
) -> dict[str, Any]:
    deciles = statistics.quantiles(samples_s, n=10)
    return {
        "precision": precision,
        "variant": name,
        "tokens_per_s_p50": round(tokens / statistics.median(samples_s), 1),
        "tokens_per_s_p20": round(tokens / deciles[7], 1),
        "tokens_per_s_p80": round(tokens / deciles[1], 1),
        "seconds_p50": round(statistics.median(samples_s), 4),
        "samples": len(samples_s),
        "parameters": parameters,
        "ratio": round(statistics.median(base / own for base, own in zip(base_s, samples_s, strict=True)), 3),
    }
