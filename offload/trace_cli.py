"""`expertier trace predictor` and `trace batches`: what a trace can teach, and who should share a batch."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from routing.ground.files import write_json
from routing.traces import RoutingTrace

Trace = Annotated[Path, typer.Argument(help="A routing trace (.npz).")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Also write the numbers as JSON.")]


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
