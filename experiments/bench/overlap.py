"""`expertier bench overlap`: how much of an exchange woven parts hide behind computation, at a limited rate.

The rate is that of a token bucket (`tbf`) on the interface that each process has in a network namespace of its own.
Where namespaces may not be made, `--simulated` holds rows back in our own code, and says so.
"""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from routing.ground.expect import expect_outputs
from routing.ground.files import write_json
from routing.ground.quantity import format_size, parse_size
from routing.ground.terminal import plain_console

from ..evidence.record import RECORDS, expect_records, save_record
from ..placed.interface import Interface, is_apart, launch_apart
from ..train.distributed.launch import is_leader, is_worker, launch
from .listed import listed_ratios

LEAST_RATIO, MOST_RATIO = 0.2, 5.0
"""Of exchange over computation: beyond them so little can be hidden that noise would be printed."""
SEED = 0  # of weights, tokens and routing


def bench_overlap(
    rate: Annotated[str, typer.Option(help="Bytes per second of the connection.")] = "16MiB",
    simulated: Annotated[
        bool, typer.Option("--simulated", help="Hold rows back in this program instead of limiting an interface.")
    ] = False,
    ratio: Annotated[
        str | None, typer.Option(help="Of exchange over computation: take the rates that give these, such as 0.5,1,2.")
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="Processes, of one thread each.")] = 2,
    parts: Annotated[int, typer.Option(min=1, help="Into which each process cuts its tokens.")] = 6,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of all processes together.")] = 2048,
    layers: Annotated[int, typer.Option(min=1, help="Layers with experts.")] = 8,
    experts: Annotated[int, typer.Option(min=1, help="Experts of a layer.")] = 16,
    top_k: Annotated[int, typer.Option(min=1, help="Experts of a token.")] = 2,
    width: Annotated[int, typer.Option(min=1, help="D, entries of a token.")] = 512,
    inner_width: Annotated[int, typer.Option(min=1, help="F of an expert.")] = 2048,
    repeats: Annotated[int, typer.Option(min=3, help="Runs of each way, in turns.")] = 5,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the result as JSON.")] = None,
    record: Annotated[bool, typer.Option("--record", help="Keep the result under experiments/records.")] = False,
    records: Annotated[Path, typer.Option(help="Where records live.")] = RECORDS,
) -> None:
    """Time computation alone, exchange alone, parts one after the other, and parts woven, in one run.

    The bound is the longer of the first two. Bits of both orders must be equal, or no time is printed. Each process
    should have a core of its own; it has an interface of its own, in a network namespace, whose rate is limited.

    Example: `expertier bench overlap --ratio 0.5,1,2`

    Where namespaces may not be made: `expertier bench overlap --ratio 1 --simulated`
    """
    expect_records(records)
    expect_outputs(json_file, inputs=[])
    bytes_per_s = parse_size(rate)
    if top_k > experts:
        raise ValueError(f"--top-k {top_k} is more than the {experts} experts of a layer")
    ratios = listed_ratios(ratio, "--ratio", LEAST_RATIO, MOST_RATIO) if ratio else []
    if processes > 1 and not is_worker():
        start = launch(sys.argv[1:], processes) if simulated else launch_apart(sys.argv[1:], processes, bytes_per_s)
        raise typer.Exit(start)
    from ..placed.overlap import Speed, measure

    sizes = {"layers": layers, "experts": experts, "top_k": top_k, "width": width, "inner_width": inner_width}
    sizes |= {"parts": parts, "tokens": tokens, "repeats": repeats}
    speed = Speed(bytes_per_s=bytes_per_s, ratios=ratios, interface=None if simulated else Interface())
    found = measure(**sizes, seed=SEED, speed=speed if simulated or is_apart() else None)
    limit = "simulated" if simulated else "tbf on each process's interface" if is_apart() else "none"
    rows = []
    for one in found:  # every process takes part in every rate
        rows.append({"processes": processes, "parts": parts, "limit": limit, **one, **_judged(one)})
        if is_leader():
            _print(rows[-1])
    if not is_leader():
        return
    if json_file:
        write_json(json_file, {"rates": rows})
    if record:
        typer.echo(f"record: {save_record('overlap', rows, config=sizes, seed=SEED, folder=records)}")


def _judged(found: dict[str, Any]) -> dict[str, Any]:
    """The bound, and what was hidden of the shorter of computation and exchange; None where noise would be told."""
    compute_s, exchange_s = found["compute_s"], found["exchange_s"]
    is_told = compute_s > 0 and LEAST_RATIO <= exchange_s / compute_s <= MOST_RATIO
    hidden = (found["in_turn_s"] - found["woven_s"]) / min(compute_s, exchange_s) if is_told else None
    bound_s = max(compute_s, exchange_s)
    return {"bound_s": bound_s, "woven_over_bound": found["woven_s"] / bound_s if is_told else None, "hidden": hidden}


def _print(row: dict[str, Any]) -> None:
    console = plain_console()
    rate = "" if row["bytes_per_s"] is None else f"{format_size(round(row['bytes_per_s']))} per second "
    console.print(
        f"{row['processes']} processes, {rate}({row['limit']}): "
        f"computation alone {row['compute_s']:.3f} s, exchange alone {row['exchange_s']:.3f} s, "
        f"{row['parts']} parts in turn {row['in_turn_s']:.3f} s, woven {row['woven_s']:.3f} s; bits equal",
        highlight=False,
    )
    if row["hidden"] is None:
        console.print(
            f"exchange over computation is outside {LEAST_RATIO} to {MOST_RATIO}: nothing is said of what is hidden"
        )
    else:
        console.print(
            f"woven is {row['woven_over_bound']:.2f} of the bound {row['bound_s']:.3f} s; "
            f"{row['hidden']:.0%} of the shorter is hidden",
            highlight=False,
        )
    if "sent_over_rows" in row:
        sent = f"{row['sent_over_rows']:.3f}"
        console.print(f"the interface of process 0 sent {sent} bytes for each byte of rows", highlight=False)
