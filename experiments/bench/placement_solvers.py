"""`expertier bench placement`: every solver on generated and given workloads, quality and time in one table."""

import contextlib
import itertools
import os
import resource
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from routing.ground.expect import expect_there
from routing.ground.terminal import plain_console

from ..evidence.record import RECORDS, expect_records, save_record

COLUMNS = ("case", "solver", "balancedness", "gap", "gpu_fanout", "node_fanout", "hops", "held_balancedness",
           "held_gpu_fanout", "held_node_fanout", "held_hops", "p20_s", "p50_s", "p80_s", "n", "peak_gib")  # fmt: skip


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
        list[Path] | None,
        typer.Option(help="Expert loads: the first is planned on, the last scored; 4 or more: trios."),
    ] = None,
    trace: Annotated[Path | None, typer.Option(help="A trace: even sequences planned on, odd scored.")] = None,
    repeats: Annotated[int, typer.Option(help="Runs per solver.")] = 3,
    time_limit: Annotated[float, typer.Option(help="Seconds per solve.")] = 30.0,
    records: Annotated[Path, typer.Option(help="Folder of the record.")] = RECORDS,
) -> None:
    """Compare placement solvers on generated workloads, or on given ones; the fast EPLB is checked first.

    Example: `expertier bench placement --repeats 3`
    """
    expect_records(records)
    expect_there(*(loads or ()), trace)
    console = plain_console()
    eplb_times = _eplb_parity_and_time()
    console.print(
        f"EPLB equals its reference; 58 x 256, 288 slots: {1e3 * np.median(eplb_times):.2f} ms", highlight=False
    )
    rows = [_row("r1-like 288/32, EPLB alone", "eplb-global", eplb_times)]
    given = [path.name for path in (loads or [])] + ([trace.name] if trace else [])
    for case in _given_cases(loads or [], trace) if given else _generated_cases():
        for solver in case.solvers:
            rows.append(_run(case, solver, repeats, time_limit))
            console.print(f"{case.name}: {solver} done in {rows[-1]['p50_s']:.2f} s", highlight=False)
    if len(loads or []) > 3:
        rows += _trio_rows(loads or [])
    _print(console, rows)
    config = {"repeats": repeats, "time_limit_s": time_limit, "given": given}
    slug = "placement-goals" if given else "placement-solvers"
    folder = save_record(slug, rows, config=config, seed=0, folder=records)
    console.print(f"record: {folder}", highlight=False)


def _run(case: Case, solver: str, repeats: int, time_limit_s: float) -> dict[str, Any]:
    from placement import score, solve

    seconds, plan = [], None
    with _peak_memory() as peak:
        for seed in range(repeats):
            began = time.perf_counter()
            plan = solve(case.planned, objective=case.objective, solver=solver, time_limit_s=time_limit_s, seed=seed)
            seconds.append(time.perf_counter() - began)
    assert plan is not None
    planned, held = score(case.planned, plan), score(case.held, plan)
    return _row(case.name, solver, seconds, planned, held) | {"peak_gib": peak[0] / 2**30}


@contextmanager
def _peak_memory() -> Iterator[list[int]]:
    """Bytes of this process and its descendants at the worst moment (Linux; shared pages count in each of them)."""
    peak, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.2):
            peak[0] = max(peak[0], _tree_bytes())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def _tree_bytes() -> int:
    parent, resident = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            parent[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            resident[int(folder.name)] = int((folder / "statm").read_text().split()[1])
    mine = {os.getpid()}
    while more := {pid for pid, one in parent.items() if one in mine} - mine:
        mine |= more
    return sum(resident.get(pid, 0) for pid in mine) * resource.getpagesize()


def _trio_rows(paths: list[Path]) -> list[dict[str, Any]]:
    """Plans of every three workloads, scored on the worst of the others; EPLB planned on each of the three alone."""
    from placement import Cluster, Problem, read_loads, score, solve

    tables = [read_loads(path) for path in paths]
    cluster = Cluster.grid(4, 8)
    others = [Problem.from_loads(table, cluster, replicas=32) for table in tables]
    single = [solve(problem, solver="eplb-global") for problem in others]
    rows = []
    for trio in itertools.combinations(range(len(tables)), 3):
        unseen = [others[index] for index in range(len(tables)) if index not in trio]
        name = "trio " + "+".join(paths[index].stem for index in trio)
        planned = Problem.from_loads({str(index): tables[index] for index in trio}, cluster, replicas=32)
        began = time.perf_counter()
        plans = [("search", solve(planned, solver="search")), *((f"EPLB {paths[i].stem}", single[i]) for i in trio)]
        seconds = [time.perf_counter() - began]
        for solver, plan in plans:
            worst = min((score(problem, plan) for problem in unseen), key=lambda found: found.balancedness)
            rows.append(_row(name, solver, seconds, score(planned, plan), worst))
    return rows


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

    cases = [_pipeline_case()]
    if loads:
        tables = [read_loads(loads[0]), read_loads(loads[-1])]
        for nodes, replicas in ((4, 32), (8, 64), (4, 0)):
            cluster = Cluster.grid(nodes, 8)
            planned, held = (Problem.from_loads(table, cluster, replicas=replicas) for table in tables)
            name = f"given {planned.num_slots}/{8 * nodes}"
            cases.append(Case(name, planned, held, "balance", ("contiguous", "eplb-global", "lpt", "search")))
    if trace is not None:
        data = RoutingTrace.load(trace)
        for nodes, objective in ((1, "fanout+balance"), (2, "fanout+balance"), (1, "hops")):
            cluster = Cluster.grid(nodes, 8 // nodes)
            name = f"given trace {nodes}x{8 // nodes} {objective}"
            cases.append(_split_case(name, data, cluster, objective, ("contiguous", "eplb-global", "auto")))
    return cases


def _pipeline_case() -> Case:
    """58 layers of 256 experts on 8 x 8 GPUs; generated, checked on other data of the same generator."""
    from placement import Cluster, Problem, generate_trace

    trace = generate_trace(tokens=18_000, layers=58, experts=256, top_k=8, blocks=32)
    cluster = Cluster.grid(8, 8)
    planned, held = (Problem.from_trace(trace.rows(*rows), cluster) for rows in ((0, 12_000), (12_000, None)))
    return Case("58x256, 8x8, full pipeline", planned, held, "fanout+balance", ("auto",))


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
