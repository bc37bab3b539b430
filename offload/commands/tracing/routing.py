"""`expertier trace record`, `predictor` and `batches`: record a trace, learn from it, form batches by it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from routing.ground.expect import expect_outputs
from routing.ground.files import write_json
from routing.ground.quantity import parse_size
from routing.ground.terminal import plain_console
from routing.traces import RoutingTrace

from ..options import CacheExperts, CpuMemory, JsonFile, Model, expect_model, quiet_transformers

Trace = Annotated[Path, typer.Argument(help="A routing trace (.npz).")]
LEAST_ROWS = 500
"""Rows below which a predictor is refused: a tenth of them judges it, and 50 rows give a rate to some 0.1."""


def predictor(
    trace: Trace,
    out: Annotated[Path, typer.Option("--out", help="Where to write the predictor (.npz).")],
    rows: Annotated[int | None, typer.Option("--rows", min=LEAST_ROWS, help="Use the first rows of the trace.")] = None,
    before_pass: Annotated[
        bool,
        typer.Option(
            "--before-pass",
            help="Predict all layers' experts from token ids, before a pass begins; the trace must have them.",
        ),
    ] = False,
    json_file: JsonFile = None,
) -> None:
    """Train a predictor of experts, for `--prefetch FILE`; the last tenth of the rows judges it.

    Without more it is one of the next two layers, from the layers that are routed. With `--before-pass` it is a small
    transformer, which the layers that are routed correct; `--policy predicted` then keeps what it expects.

    Example: `expertier trace predictor routing.npz --out predictor.npz`
    """
    expect_outputs(out, json_file, inputs=[trace])
    recorded = RoutingTrace.load(trace)
    recorded = recorded if rows is None else recorded.rows(0, rows)
    num_rows = len(recorded.expert_TLK)
    if num_rows < LEAST_ROWS:
        raise ValueError(
            f"trace {trace}: {num_rows} rows are too few to train a predictor and to judge it; record at least "
            f"{LEAST_ROWS}, better 10,000 (`expertier trace record --tokens 10000`)"
        )
    split = num_rows - num_rows // 10
    learnt, judging = recorded.rows(0, split), recorded.rows(split, num_rows)
    report = _of_passes(learnt, judging, out) if before_pass else _of_layers(learnt, judging, out)
    if json_file:
        write_json(json_file, report)


def _of_layers(learnt: RoutingTrace, judging: RoutingTrace, out: Path) -> dict[str, Any]:
    """Train, judge and save regressions on the layers before."""
    from rich.progress import Progress

    from ...prefetch.predictor import AHEAD
    from ...prefetch.predictor_fit import fit_predictor, precision_and_recall

    with Progress(console=plain_console(stderr=True)) as progress:
        task = progress.add_task("train", total=len(AHEAD) * learnt.num_layers)
        fitted = fit_predictor(learnt, progress=lambda: progress.advance(task))
    scores = precision_and_recall(fitted, judging)
    fitted.save(out)
    plain_console().print(_guesses({str(ahead): found for ahead, found in scores.items()}))
    return {str(ahead): {"precision": found[0], "recall": found[1]} for ahead, found in scores.items()}


def _of_passes(learnt: RoutingTrace, judging: RoutingTrace, out: Path) -> dict[str, Any]:
    """Train, judge and save a predictor of all layers before a pass."""
    from dataclasses import asdict

    from rich.progress import Progress

    from ...prefetch.pass_fit import fit_pass_predictor, score

    with Progress(console=plain_console(stderr=True)) as progress:
        task = progress.add_task("train", total=None)
        fitted = fit_pass_predictor(learnt, progress=lambda steps: progress.update(task, advance=1, total=steps))
    found = score(fitted, judging)
    fitted.save(out)
    console = plain_console(soft_wrap=True)
    corrected = {f"corrected, {ahead} ahead": rates for ahead, rates in found.corrected.items()}
    console.print(_guesses({"before the pass": found.before, **corrected}))
    console.print(f"{found.top:.3f} of the experts are among the likeliest, as many as a token visits")
    rates = ", ".join(f"{name} {rate:.3f}" for name, rate in found.hit_rates.items())
    console.print(f"hit rates with a slot for every fourth expert: {rates}")
    return asdict(found)


def _guesses(rows: Mapping[str, tuple[float, float]]) -> Table:
    table = Table("layers ahead", "guesses that are right", "experts that are guessed")
    for name, (precision, recall) in rows.items():
        table.add_row(name, f"{precision:.3f}", f"{recall:.3f}")
    return table


def batches(
    trace: Trace,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Prompts per batch.")] = 8,
    json_file: JsonFile = None,
) -> None:
    """Form batches of a trace's sequences that share experts, and compare with the order in which they came.

    Example: `expertier trace batches routing.npz --batch-size 8`
    """
    expect_outputs(json_file, inputs=[trace])
    from ...serve.batches import experts_touched, form_batches, in_order, signatures

    signature = signatures(RoutingTrace.load(trace))
    if not len(signature):
        raise ValueError(f"trace {trace}: it has no rows")
    plain, formed = in_order(len(signature), batch_size), form_batches(signature, batch_size)
    before, after = experts_touched(signature, plain), experts_touched(signature, formed)
    plain_console().print(
        f"{len(plain)} batches of {batch_size}: {sum(before) / len(before):.1f} experts per batch in order, "
        f"{sum(after) / len(after):.1f} formed by shared experts"
    )
    if json_file:
        write_json(json_file, {"batches": formed, "experts_before": before, "experts_after": after})


def record(
    model: Model,
    data: Annotated[Path, typer.Option("--data", help="A text file, or a folder of text files.")],
    out: Annotated[Path, typer.Option("--out", help="Where the trace goes (.npz).")],
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Tokens to run; no more text is read.")] = 8192,
    length: Annotated[int, typer.Option("--length", min=1, help="Tokens per sequence.")] = 512,
    cpu_memory: CpuMemory = "auto",
    cache_experts: CacheExperts = None,
) -> None:
    """Run a model over text and record which experts each token uses.

    Example: `expertier trace record my-model --data book.txt --out routing.npz`
    """
    expect_model(model)
    expect_outputs(out, inputs=[model, data])
    if cpu_memory != "auto":
        parse_size(cpu_memory)
    console = plain_console(stderr=True)
    from rich.progress import Progress

    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(f"reading {model}", total=None)
        from ...checkpoint.location import local_folder
        from ...runtime.loading import load
        from ...serve.corpus import sequences, text_files
        from ...serve.recording import record_over
        from ...serve.text import open_text

        text_files(data)
        quiet_transformers()
        text = open_text(local_folder(model))
        loaded = load(model, cpu_memory=cpu_memory, cache_experts=cache_experts, context=length, record_trace=True)
        progress.update(task, total=tokens, description="recording")
        pieces = sequences(data, text, length, tokens)
        done = record_over(loaded, pieces, out, lambda count: progress.advance(task, count))
    if text.note:
        console.print(text.note, soft_wrap=True)
    console.print(f"{done} tokens recorded in {out}", soft_wrap=True)
    if done < tokens:
        console.print(f"the text has no more; {tokens} were wanted")
