"""`expertier bench placement`: every solver on generated and given workloads, quality and time in one table."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from .record import RECORDS, save_record

COLUMNS = ("case", "solver", "balancedness", "gap", "gpu_fanout", "node_fanout", "hops", "held_balancedness",
           "held_gpu_fanout", "held_node_fanout", "held_hops", "p20_s", "p50_s", "p80_s", "n")  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One row group of the table: a problem to plan on, one to check with, an objective and the solvers for it."""

    name: str
    planned: Any
    held: Any
    objective: str
    solvers: tuple[str, ...]


def bench_placement(
    loads: Annotated[
        list[Path] | None, typer.Option(help="Loads to add; the first is planned on, the last scored.")
    ] = None,
    trace: Annotated[Path | None, typer.Option(help="A trace to add: even sequences planned on, odd scored.")] = None,
    repeats: Annotated[int, typer.Option(help="Runs per solver.")] = 3,
    time_limit: Annotated[float, typer.Option(help="Seconds per solve.")] = 60.0,
    records: Annotated[Path, typer.Option(help="Folder of the record.")] = RECORDS,
) -> None:
    """Compare placement solvers; parity of the fast EPLB with its reference is checked first.

    Example: `expertier bench placement --repeats 3`
    """
    from placement import score, solve

    console = Console()
    eplb_times = _eplb_parity_and_time()
    console.print(
        f"EPLB equals its reference; 58 x 256, 288 slots: {1e3 * np.median(eplb_times):.2f} ms", highlight=False
    )
    rows = [_row("r1-like 288/32, EPLB alone", "eplb-global", eplb_times)]
    cases = [*_generated_cases(), *_given_cases(loads or [], trace)]
    for case in cases:
        for solver in case.solvers:
            seconds, plan = [], None
            for seed in range(repeats):
                began = time.perf_counter()
                plan = solve(case.planned, objective=case.objective, solver=solver, time_limit_s=time_limit, seed=seed)
                seconds.append(time.perf_counter() - began)
            assert plan is not None
            planned, held = score(case.planned, plan), score(case.held, plan)
            rows.append(_row(case.name, solver, seconds, planned, held))
            console.print(f"{case.name}: {solver} done in {np.median(seconds):.2f} s", highlight=False)
    _print(console, rows)
    given = [path.name for path in (loads or [])] + ([trace.name] if trace else [])
    folder = save_record(
        "placement-solvers",
        rows,
        config={"repeats": repeats, "time_limit_s": time_limit, "given": given},
        seed=0,
        folder=records,
    )
    console.print(f"record: {folder}", highlight=False)


def _eplb_parity_and_time() -> list[float]:
    from placement import eplb, eplb_layer_reference, generate_loads

    load = generate_loads()[3:]
    for slots, groups, nodes, gpus in ((288, 8, 4, 32), (288, 1, 1, 32), (320, 8, 8, 64)):
        expected = [eplb_layer_reference(row, slots, groups, nodes, gpus) for row in load.tolist()]
        if eplb(load, slots, groups, nodes, gpus).tolist() != expected:
            raise RuntimeError(f"the fast EPLB differs from its reference at {slots} slots on {gpus} GPUs")
    return [_timed(lambda: eplb(load, 288, 1, 1, 32)) for _ in range(30)]


def _timed(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def _generated_cases() -> list[Case]:
    from placement import Cluster, Problem, generate_loads, generate_trace

    balance = ("contiguous", "round-robin", "random", "eplb", "eplb-global", "lpt", "search")
    load, other = generate_loads(), generate_loads(drift=0.5)
    cases = []
    for nodes, replicas in ((4, 32), (8, 64), (4, 0)):
        cluster = Cluster.grid(nodes, 8, model={"expert_groups": 8})
        planned, held = (Problem.from_loads(one, cluster, replicas=replicas) for one in (load, other))
        cases.append(Case(f"r1-like {256 + replicas}/{8 * nodes}", planned, held, "balance", balance))
    trace = generate_trace(tokens=40_000)
    for nodes, objective, solvers in (
        (1, "fanout+balance", ("contiguous", "eplb-global", "search")),
        (2, "fanout+balance", ("contiguous", "eplb-global", "search")),
        (1, "hops+balance", ("contiguous", "search", "moetuner")),
    ):
        cluster = Cluster.grid(nodes, 8 // nodes)
        cases.append(_split_case(f"gpt-oss-like {nodes}x{8 // nodes} {objective}", trace, cluster, objective, solvers))
    return cases


def _given_cases(loads: list[Path], trace: Path | None) -> list[Case]:
    from placement import Cluster, Problem, read_loads
    from routing.traces import RoutingTrace

    cases = []
    if loads:
        tables = [read_loads(path) for path in loads]
        for nodes, replicas in ((4, 32), (8, 64), (4, 0)):
            cluster = Cluster.grid(nodes, 8)
            planned, held = (Problem.from_loads(table, cluster, replicas=replicas) for table in (tables[0], tables[-1]))
            slots = planned.num_slots
            cases.append(
                Case(
                    f"given {slots}/{8 * nodes}",
                    planned,
                    held,
                    "balance",
                    ("contiguous", "eplb-global", "lpt", "search"),
                )
            )
    if trace is not None:
        data = RoutingTrace.load(trace)
        for nodes, objective in ((1, "fanout+balance"), (2, "fanout+balance"), (1, "hops+balance")):
            cluster = Cluster.grid(nodes, 8 // nodes)
            solvers = ("contiguous", "eplb-global", "search")
            cases.append(
                _split_case(f"given trace {nodes}x{8 // nodes} {objective}", data, cluster, objective, solvers)
            )
    return cases


def _split_case(name: str, trace: Any, cluster: Any, objective: str, solvers: tuple[str, ...]) -> Case:
    from placement import Problem

    even = trace.sequence_T % 2 == 0
    planned, held = (Problem.from_trace(trace.select(rows), cluster) for rows in (even, ~even))
    return Case(name, planned, held, objective, solvers)


def _row(case: str, solver: str, seconds: list[float], planned: Any = None, held: Any = None) -> dict[str, Any]:
    p20, p50, p80 = np.percentile(seconds, (20, 50, 80))
    row: dict[str, Any] = dict.fromkeys(COLUMNS, "")
    row |= {"case": case, "solver": solver, "p20_s": p20, "p50_s": p50, "p80_s": p80, "n": len(seconds)}
    if planned is not None:
        names = ("balancedness", "gpu_fanout", "node_fanout", "hops")
        row |= {name: getattr(planned, name) for name in names} | {"gap": planned.gap}
        row |= {f"held_{name}": getattr(held, name) for name in names}
    return row


def _print(console: Console, rows: list[dict[str, Any]]) -> None:
    shown = [name for name in COLUMNS if name not in ("p20_s", "p80_s", "n", "hops", "held_hops")]
    table = Table(*shown)
    for row in rows:
        table.add_row(
            *(f"{row[name]:.4g}" if isinstance(row[name], float) else str(row[name] or "-") for name in shown)
        )
    console.print(table)
