"""`expertier bench kernels`: the expert kernels against every peer that can run here, parity first."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from routing.ground.expect import expect_outputs
from routing.ground.terminal import plain_console

if TYPE_CHECKING:
    from .shapes import LayerShape

# a decode step, a small batch, a prompt: one case for each path of `grouped_experts`
CPU_TOKENS = (1, 64, 512)
# of weights, inputs and routings: the same in every run
SEED = 0
NO_GPU = "no GPU here: the Triton kernels stay unmeasured; what follows is the path that a CPU takes"


def bench_kernels(
    shape: Annotated[list[str] | None, typer.Option(help="A layer by name; repeat for more; all without it.")] = None,
    tokens: Annotated[
        list[int] | None, typer.Option(min=1, help="Numbers of tokens; the usual ones without it.")
    ] = None,
    routing: Annotated[list[str] | None, typer.Option(help="uniform, zipf or one-hot; repeat for more.")] = None,
    trace: Annotated[Path | None, typer.Option(help="Also replay this trace; needs --shape.")] = None,
    seconds: Annotated[
        float, typer.Option(min=1, help="Stop measuring after so long, and say what is missing.")
    ] = 480.0,
    tune: Annotated[
        bool, typer.Option("--tune", help="First choose tiles by measuring (minutes), and keep them.")
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the table as JSON.")] = None,
    record: Annotated[bool, typer.Option("--record", help="Save a record.")] = False,
) -> None:
    """Time MoE layers: forward, forward and backward, peak memory; refuses to print a time when parity is red.

    Example: `expertier bench kernels --shape qwen3-30b-a3b --tokens 1 --tokens 32768`
    """
    import torch

    from .goals import verdicts

    expect_outputs(json_file, inputs=[trace])
    has_gpu = torch.cuda.is_available()
    console = plain_console()
    if not has_gpu:
        console.print(NO_GPU, highlight=False)
    failed: list[str] = []
    work = _on_gpu(shape, tokens, routing, trace, tune, failed) if has_gpu else _on_cpu(shape, tokens)
    rows, missing, broken = _measure(console, work, time.monotonic() + seconds)
    _show(console, rows, "MoE layers, parity checked" + ("; cold cache, graph replay" if has_gpu else "; A B A B"))
    goals = verdicts(rows) if has_gpu else []
    _show(console, goals, "Goals on an H100 or H200")
    if missing:
        console.print(f"not measured, out of time: {', '.join(missing)}", highlight=False)
    for line in failed:
        console.print(f"not measured, failed: {line}", highlight=False)
    _keep(rows, goals, missing, failed, json_file, record, has_gpu)
    if broken is not None:
        raise broken


Work = Iterator[tuple[str, Any]]


def _measure(console: Console, work: Work, deadline: float) -> tuple[list[dict[str, Any]], list[str], Exception | None]:
    """Rows that were measured, names of those that the deadline left out, and what ended the work early, if anything.

    An error of our own path is kept until its rows are shown, a red parity is not: it makes all rows void.
    """
    from .measured import ParityError

    rows: list[dict[str, Any]] = []
    missing: list[str] = []
    try:
        for what, measure in work:
            if time.monotonic() > deadline:
                missing.append(what)
                continue
            with console.status(what):
                rows += measure()
    except KeyboardInterrupt:
        console.print("interrupted; what was measured follows")
    except ParityError:
        raise
    except Exception as error:
        if not rows:
            raise
        console.print("our own path failed; what was measured before follows")
        return rows, missing, error
    return rows, missing, None


def _on_gpu(*cases: Any) -> Work:
    # triton is imported only where it runs
    from .gpu import gpu_work

    return gpu_work(*cases)


def _on_cpu(names: list[str] | None, tokens: list[int] | None) -> Work:
    import torch

    from .shapes import CPU_SHAPES, chosen

    for name, layer in chosen(names, CPU_SHAPES).items():
        for dtype in (torch.float32, torch.bfloat16):
            for num_tokens in tokens or CPU_TOKENS:
                yield (
                    f"{name} {dtype} T={num_tokens}",
                    lambda n=name, s=layer, d=dtype, t=num_tokens: _cpu_rows(n, s, d, t),
                )


def _cpu_rows(name: str, layer: "LayerShape", dtype: Any, num_tokens: int) -> list[dict[str, Any]]:
    import numpy as np
    from transformers.integrations.moe import grouped_mm_experts_forward

    from moe import grouped_experts

    from .contestants import Contestant
    from .measured import call_of, require_parity, row_of
    from .shapes import experts_module, layer_input, uniform
    from .timing import summary, time_in_turns

    generator = np.random.default_rng(SEED)
    experts = experts_module(layer, dtype, "cpu", SEED)
    given = layer_input(uniform(num_tokens, layer, generator), layer, dtype, "cpu", generator)
    contestants = [
        Contestant("transformers grouped_mm", grouped_mm_experts_forward),
        Contestant("expertier", grouped_experts),
    ]
    require_parity(contestants, experts, given, f"{name} {dtype} T={num_tokens}")
    rows = []
    for is_training in (False, True):
        calls = {one.name: call_of(one, experts, given, is_training) for one in contestants}
        samples_s = time_in_turns(calls)
        base_s = np.array(samples_s["transformers grouped_mm"])
        routing = f"uniform {dtype}".replace("torch.", "")
        rows += [
            row_of(name, layer, num_tokens, routing, is_training, who, summary(found_s, False))
            | {"ratio_to_grouped_mm": round(float(np.median(np.array(found_s) / base_s)), 3)}
            for who, found_s in samples_s.items()
        ]
    return rows


def _show(console: Console, rows: list[dict[str, Any]], title: str) -> None:
    if not rows:
        return
    table = Table(title=title)
    for column in rows[0]:
        table.add_column(column, justify="left" if isinstance(rows[0][column], str) else "right")
    for row in rows:
        table.add_row(*("" if value is None else str(value) for value in row.values()))
    plain_console(width=max(console.width, 200)).print(table)


def _keep(
    rows: list[dict[str, Any]],
    goals: list[dict[str, Any]],
    missing: list[str],
    failed: list[str],
    json_file: Path | None,
    record: bool,
    has_gpu: bool,
) -> None:
    from routing.ground.files import write_json

    from ...evidence.record import save_record

    found = {"goals": goals, "not_measured": missing, "failed": failed}
    if json_file is not None:
        write_json(json_file, {"rows": rows} | found)
    if record and rows:
        config = found | {"cold_cache": has_gpu, "graph_replay": has_gpu}
        folder = save_record("kernels-gpu" if has_gpu else "kernels-cpu", rows, config=config, seed=SEED)
        typer.echo(f"record: {folder}")
