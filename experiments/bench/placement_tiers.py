"""`expertier bench tiers`: experts over all memories of a cluster, batches, and plans on unseen data.

The gate: on a machine so small that all placements can be listed, the integer programme finds the best one, and the
checker of plans agrees with the certificate.
"""

import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from routing.ground.expect import expect_there
from routing.ground.terminal import plain_console

from ..evidence.record import RECORDS, expect_records, save_record

COLUMNS = ("case", "solver", "seconds", "objective", "bound", "gap", "bound_name", "predicted", "achieved", "error",
           "mean", "p95", "balancedness", "n")  # fmt: skip
GPU = {"hbm": 3.35e12, "flops": {"bf16": 989e12}}
NODE = {"nvlink": 450e9, "pcie": 64e9, "cpu": {"bandwidth": 200e9, "flops": 5e12}}
GPT_OSS = {"hidden": 2880, "moe_intermediate": 2880, "dtype": "fp4"}
R1 = {"hidden": 7168, "moe_intermediate": 2048, "dtype": "fp8", "top_k": 8}


def bench_tiers(
    trace: Annotated[Path, typer.Option(help="A trace: even sequences planned on, odd ones judged.")],
    loads: Annotated[
        Path | None, typer.Option(help="Expert loads of a large model, for four nodes of eight GPUs.")
    ] = None,
    time_limit: Annotated[float, typer.Option(help="Seconds per solve.")] = 60.0,
    records: Annotated[Path, typer.Option(help="Folder of the record.")] = RECORDS,
) -> None:
    """Solve tiers on one node and on clusters, predict steps on held-out rows, judge plans batch by batch.

    Example: `expertier bench tiers --trace routing.npz --loads counts.json`
    """
    expect_records(records)
    expect_there(trace, loads)
    _expect_best_of_all()
    console, rows = plain_console(), []
    for row in _all_rows(trace, loads, time_limit):
        rows.append(dict.fromkeys(COLUMNS, "") | row)
        shown = {key: f"{v:.5g}" if isinstance(v, float) else v for key, v in row.items()}
        console.print(", ".join(f"{key} {value}" for key, value in shown.items()), highlight=False)
    config = {"time_limit_s": time_limit, "given": [path.name for path in (trace, loads) if path is not None]}
    folder = save_record("placement-tiers", rows, config=config, seed=0, folder=records)
    console.print(f"record: {folder}", highlight=False)


def _all_rows(trace: Path, loads: Path | None, time_limit: float) -> Iterator[dict[str, Any]]:
    from routing.traces import RoutingTrace

    data = RoutingTrace.load(trace)
    even = data.sequence_T % 2 == 0
    planned, held = data.select(even), data.select(~even)
    yield from _solved_rows(planned, loads, time_limit)
    yield from _predicted_rows(planned, held)
    yield from _batch_rows(planned, held, time_limit)
    yield from _first_plan_rows(loads)


def machines(model: dict[str, Any], layers: int, experts: int, nodes: int, gpus: int, **settings: Any) -> Any:
    """A cluster whose GPUs hold a share of all experts, whose host memories another, and whose SSDs the rest.

    Args:
        model: the section of the cluster file.
        layers, experts: of the model.
        nodes, gpus: equal nodes with so many GPUs each.
        settings: `on_gpu`, `in_host` (shares of all experts), `ssd` (bytes per second), and keys of `tiers`.
    """
    from placement import Cluster
    from placement.contract.spec import ModelSpec

    whole = layers * experts * (ModelSpec.model_validate(model).bytes_per_expert or 0)
    tiers = {key: value for key, value in settings.items() if key not in ("on_gpu", "in_host", "ssd")}
    node = {
        **NODE,
        "gpus": {"type": "g", "count": gpus},
        "dram": {"size": int(settings["in_host"] * whole / nodes), "bandwidth": 300e9},
        "ssd": {"size": int(2 * whole), "bandwidth": settings.get("ssd", 7e9)},
    }
    memory = int(settings["on_gpu"] * whole / nodes / gpus)
    return Cluster.from_mapping(
        {
            "model": model,
            "gpu_types": {"g": {**GPU, "memory": memory}},
            "node_types": {"n": node},
            "nodes": [{"type": "n", "count": nodes}],
            "tiers": tiers,
        }
    )


def _solved_rows(planned: Any, loads: Path | None, time_limit: float) -> Iterator[dict[str, Any]]:
    """The cases of the certificate: one node, two nodes, four nodes with a large model."""
    from placement import Problem, read_loads

    L, E = planned.num_layers, planned.num_experts
    for nodes, gpus in ((1, 1), (2, 4)):
        cluster = machines(GPT_OSS, L, E, nodes, gpus, on_gpu=0.4, in_host=0.35, batch=16)
        yield _solved(f"trace, {nodes} x {gpus} GPUs hold 40 %", Problem.from_trace(planned, cluster), time_limit)
    if loads is not None:
        table = read_loads(loads)
        used = int((table.sum(axis=1) > 0).sum())
        cluster = machines(R1, used, table.shape[1], 4, 8, on_gpu=0.6, in_host=0.3, ssd=14e9, batch=256)
        yield _solved("loads, 4 x 8 GPUs hold 60 %", Problem.from_loads(table, cluster), time_limit)


def _solved(case: str, problem: Any, time_limit: float) -> dict[str, Any]:
    from placement.solving.cluster_tiers import solve_cluster_tiers

    began = time.perf_counter()
    certificate = solve_cluster_tiers(problem, time_limit_s=time_limit).certificate
    assert certificate is not None
    facts = {key: getattr(certificate, key) for key in ("objective", "bound", "gap", "bound_name")}
    return {"case": case, "solver": "auto", "seconds": time.perf_counter() - began, **facts}


def _predicted_rows(planned: Any, held: Any) -> Iterator[dict[str, Any]]:
    """Seconds per step replayed on the planning rows, against the same plan replayed on the others."""
    from placement import Problem
    from placement.solving.cluster_tiers import solve_cluster_tiers
    from placement.tiers.model import tier_model
    from placement.tiers.replay import replay

    L, E = planned.num_layers, planned.num_experts
    for nodes, gpus, on_gpu, batch in itertools.product((1, 2), (2,), (0.2, 0.5), (4, 16, 64)):
        cluster = machines(GPT_OSS, L, E, nodes, gpus, on_gpu=on_gpu, in_host=0.3, batch=batch)
        mine, other = (Problem.from_trace(rows, cluster) for rows in (planned, held))
        plan = solve_cluster_tiers(mine, solver="search", time_limit_s=5)
        model = tier_model(mine)
        for cached in (False, True):
            said, came = (replay(one, plan, model, cached=cached).mean_s for one in (mine, other))
            name = f"{nodes} x {gpus}, {on_gpu:.0%} on GPUs, batch {batch}, {'cached' if cached else 'at home'}"
            yield {"case": f"held out: {name}", "predicted": said, "achieved": came, "error": abs(said - came) / came}


def _batch_rows(planned: Any, held: Any, time_limit: float) -> Iterator[dict[str, Any]]:
    """Imbalance of held-out batches of 4,096 tokens on 64 GPUs with 32 replicas, and on 8 GPUs with 8."""
    from placement import Cluster, Problem, score, solve
    from placement.objectives.batches import batch_imbalance

    contestants = {name: ("balance", name) for name in ("contiguous", "eplb-global", "biased", "search")}
    contestants["search, objective batches"] = ("batches", "search")
    for nodes, gpus, replicas in ((8, 8, 32), (1, 8, 8)):
        problem = Problem.from_trace(planned, Cluster.grid(nodes, gpus), replicas=replicas)
        other = Problem.from_trace(held, Cluster.grid(nodes, gpus), replicas=replicas)
        for name, (objective, solver) in contestants.items():
            began = time.perf_counter()
            plan = solve(problem, objective=objective, solver=solver, time_limit_s=time_limit)
            seconds = time.perf_counter() - began
            for policy in ("uniform", "lp"):
                found = batch_imbalance(plan, held, min(4096, held.num_tokens // 2), policy, most=32)
                case = f"batches, {nodes} x {gpus} GPUs, {replicas} replicas, {policy}"
                whole = score(other, plan, "balance").balancedness
                row = {"case": case, "solver": name, "seconds": seconds, "balancedness": whole}
                yield row | {"mean": found.mean, "p95": found.p95, "n": found.batches}


def _first_plan_rows(loads: Path | None) -> Iterator[dict[str, Any]]:
    """How soon a first plan of 58 x 256 in 288 slots on 32 GPUs is there: medians of 60 alternating runs."""
    from placement import Cluster, Problem, eplb, generate_loads, read_loads, score, solve
    from placement.heuristics.first import first_LP

    table = generate_loads() if loads is None else read_loads(loads)
    load_LE = table[table.sum(axis=1) > 0]
    slots = load_LE.shape[1] + 32
    runs = {"first": lambda: first_LP(load_LE, slots, 32), "eplb-global": lambda: eplb(load_LE, slots, 1, 1, 32)}
    times = {name: [0.0] * 60 for name in runs}
    for turn in range(60):
        for name, run in runs.items():
            times[name][turn] = _timed(run)
    problem = Problem.from_loads(table, Cluster.grid(4, 8), replicas=32)
    for name, seconds in times.items():
        value = score(problem, solve(problem, solver=name), "balance").balancedness
        row = {"case": "first plan, median", "solver": name, "balancedness": value, "n": len(seconds)}
        yield row | {"seconds": float(np.median(seconds))}
        yield row | {"case": "first plan, quickest", "seconds": min(seconds)}


def _timed(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def _expect_best_of_all() -> None:
    """Raise RuntimeError unless the solver's plan of a tiny machine is the best of all placements."""
    from placement import Problem, generate_trace
    from placement.solving.cluster_tiers import solve_cluster_tiers
    from placement.tiers.model import tier_model

    trace = generate_trace(tokens=200, layers=1, experts=4, top_k=2, blocks=2)
    problem = Problem.from_trace(trace, machines(GPT_OSS, 1, 4, 1, 1, on_gpu=0.25, in_host=0.5, batch=4))
    model = tier_model(problem)
    every = itertools.product(range(model.shape[2]), repeat=4)
    fitting = (np.array([ways]) for ways in every if np.all(model.used_U(np.array([ways])) <= model.ways.capacity_U))
    best = min(model.seconds(way_LE) for way_LE in fitting)
    certificate = solve_cluster_tiers(problem, solver="ilp", time_limit_s=10).certificate
    if certificate is None or abs(certificate.objective - best) > 1e-4 * best:
        raise RuntimeError(
            f"the plan of a tiny machine takes {certificate and certificate.objective} s, the best {best}"
        )
