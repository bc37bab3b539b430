"""`expertier trace record`, `predictor` and `batches`: record a trace, learn from it, form batches by it."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from routing.ground.files import write_json
from routing.traces import RoutingTrace

from .options import CacheExperts, CpuMemory, Model, expect_folder, quiet_transformers

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

    from ..prefetch.predictor import AHEAD
    from ..prefetch.predictor_fit import fit_predictor, precision_and_recall

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
    from ..serve.batches import experts_touched, form_batches, in_order, signatures

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


def record(
    model: Model,
    data: Annotated[Path, typer.Option("--data", help="A text file, or a folder of text files.")],
    out: Annotated[Path, typer.Option("--out", help="Where the trace goes (.npz).")],
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Tokens to run.")] = 8192,
    length: Annotated[int, typer.Option("--length", min=1, help="Tokens per sequence.")] = 512,
    cpu_memory: CpuMemory = "auto",
    cache_experts: CacheExperts = None,
) -> None:
    """Run a model over text and record which experts each token uses.

    Example: `expertier trace record my-model --data book.txt --out routing.npz`
    """
    from moe import text_of

    from ..runtime.loading import load
    from ..serve.corpus import sequences, text_files

    quiet_transformers()
    expect_folder(out)
    text_files(data)
    loaded = load(model, cpu_memory=cpu_memory, cache_experts=cache_experts, record_trace=True)
    text = text_of(Path(loaded.name_or_path), int(loaded.config.get_text_config().vocab_size))
    done = _run_over(loaded, sequences(data, text, length, tokens), tokens, out)
    Console(stderr=True).print(f"{done} tokens recorded in {out}", highlight=False)


def _run_over(model: Any, pieces: Any, tokens: int, out: Path) -> int:
    import time

    import torch
    from rich.progress import Progress

    done, saved_s = 0, time.perf_counter()
    try:
        with Progress(console=Console(stderr=True), transient=True) as progress, torch.no_grad():
            task = progress.add_task("recording", total=tokens)
            for piece in pieces:
                model(torch.tensor([piece]), use_cache=False)
                done += len(piece)
                progress.advance(task, len(piece))
                if time.perf_counter() - saved_s > 5:
                    model.offload.save_trace(out)
                    saved_s = time.perf_counter()
    finally:
        if done:
            model.offload.save_trace(out)
    if not done:
        raise ValueError("the data holds no text")
    return done
