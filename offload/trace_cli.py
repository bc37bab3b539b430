"""`expertier trace locality` and `trace batches`: how cacheable a routing is, and who should share a batch."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from routing.traces import RoutingTrace, write_json

Trace = Annotated[Path, typer.Argument(help="A routing trace (.npz).")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Also write the numbers as JSON.")]
WINDOWS, RATIOS = (4, 16, 64, 256), (1.0, 2.0, 3.0, 4.0)


def locality(
    trace: Trace,
    rows: Annotated[int, typer.Option("--rows", min=1, help="Only the first rows.")] = 4096,
    plot: Annotated[Path | None, typer.Option("--plot", help="Also draw the hit-rate curves into this file.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Print segment routing performance, segment cache hit rates and hit rates against cache size.

    Example: `expertier trace locality routing.npz --plot curves.svg`
    """
    from .locality import segment_cache_hits, segment_routing
    from .simulate import simulate

    recorded = RoutingTrace.load(trace).rows(0, rows)
    console = Console()
    longest = _longest_sequence(recorded)
    segments = {window: segment_routing(recorded, window) for window in WINDOWS if window <= longest}
    table = Table("window", "SRP (best F1)", "experts kept / needed")
    for window, result in segments.items():
        table.add_row(str(window), f"{result.f1:.3f}", f"{result.cache_ratio:.2f}")
    console.print(table)
    caches = {
        ratio: {str(window or "all"): segment_cache_hits(recorded, ratio, window) for window in (16, None)}
        for ratio in RATIOS
        if ratio * recorded.top_k <= recorded.num_experts
    }
    table = Table("cache / one token's need", "SCH, knows 16 tokens", "SCH, knows all")
    for ratio, rates in caches.items():
        table.add_row(f"{ratio:g}", f"{rates['16']:.3f}", f"{rates['all']:.3f}")
    console.print(table)
    sizes = sorted({max(1, recorded.num_experts * eighth // 8) for eighth in range(1, 9)})
    curves = {size: {name: run.hit_rate for name, run in simulate(recorded, size).items()} for size in sizes}
    table = Table("slots per layer", *curves[sizes[0]])
    for size, rates in curves.items():
        table.add_row(str(size), *(f"{rate:.3f}" for rate in rates.values()))
    console.print(table)
    if plot:
        _draw(plot, curves)
    if json_file:
        srp = {str(window): vars(result) for window, result in segments.items()}
        write_json(json_file, {"srp": srp, "sch": caches, "hit_rate": curves})


def predictor(
    trace: Trace,
    out: Annotated[Path, typer.Option("--out", help="Where to write the predictor (.npz).")],
    rows: Annotated[int | None, typer.Option("--rows", min=10, help="Only the first rows.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Train a predictor of the next layers' experts, for `--prefetch FILE`; the last tenth of the rows judges it.

    Example: `expertier trace predictor routing.npz --out predictor.npz`
    """
    from rich.progress import Progress

    from .predictor import AHEAD
    from .predictor_fit import fit_predictor, precision_and_recall

    recorded = RoutingTrace.load(trace)
    recorded = recorded if rows is None else recorded.rows(0, rows)
    num_rows = len(recorded.expert_TLK)
    split = num_rows - num_rows // 10
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("train", total=len(AHEAD) * recorded.num_layers)
        fitted = fit_predictor(recorded.rows(0, split), progress=lambda: progress.advance(task))
    scores = precision_and_recall(fitted, recorded.rows(split, num_rows))
    fitted.save(out)
    table = Table("layers ahead", "guesses that are right", "experts that are guessed")
    for ahead, (precision, recall) in scores.items():
        table.add_row(str(ahead), f"{precision:.3f}", f"{recall:.3f}")
    Console().print(table)
    if json_file:
        write_json(
            json_file, {str(ahead): {"precision": found[0], "recall": found[1]} for ahead, found in scores.items()}
        )


def batches(
    trace: Trace,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Prompts per batch.")] = 8,
    json_file: JsonFile = None,
) -> None:
    """Form batches of a trace's sequences that share experts, and compare with the order in which they came.

    Example: `expertier trace batches routing.npz --batch-size 8`
    """
    from .reschedule import experts_touched, form_batches, in_order, signatures

    signature = signatures(RoutingTrace.load(trace))
    plain, formed = in_order(len(signature), batch_size), form_batches(signature, batch_size)
    before, after = experts_touched(signature, plain), experts_touched(signature, formed)
    Console().print(
        f"{len(plain)} batches of {batch_size}: {sum(before) / len(before):.1f} experts per batch in order, "
        f"{sum(after) / len(after):.1f} formed by shared experts",
        highlight=False,
    )
    if json_file:
        write_json(json_file, {"batches": formed, "experts_before": before, "experts_after": after})


def _longest_sequence(trace: RoutingTrace) -> int:
    import numpy as np

    edges = np.flatnonzero(np.diff(trace.sequence_T)) + 1
    return int(np.diff([0, *edges, trace.num_tokens]).max())


def _draw(file: Path, curves: dict[int, dict[str, float]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name in next(iter(curves.values())):
        axes.plot(list(curves), [rates[name] for rates in curves.values()], marker="o", label=name)
    axes.set(xlabel="experts cached per layer", ylabel="hit rate", ylim=(0, 1))
    axes.legend()
    figure.savefig(file)
