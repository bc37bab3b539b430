"""Plans and migrations on the processes that torchrun started, and the report of both."""

from collections.abc import Sequence
from typing import Any

from torch import distributed

from placement import Plan, Problem, score, solve
from routing.traces import RoutingTrace

from ..train.distributed.run import process_group
from .coherent import stay_and_return
from .forecast import Moved, forecast
from .moving import migrate_live
from .overlap import woven_parts
from .work import Layer, Size, calls_of, carry_out, source_T

LARGEST_ERROR = 1e-5
"""Of outputs against whole experts, relative, in float32: sums in another order differ by 1e-7; a lost row by 1e-1."""


def run_plans(
    plans: dict[str, Plan],
    trace: RoutingTrace,
    *,
    against: Sequence[str] = (),
    width: int = 64,
    rows: str = "rank",
    then: Plan | None = None,
    forwards: int = 1,
    context_width: int | None = None,
    is_woven: bool = False,
) -> dict[str, Any]:
    """Carry out plans on a trace; all processes that torchrun started call this together.

    Args:
        plans: by name, for at most as many GPUs as there are processes.
        trace: what is routed.
        against: solvers whose plans of this trace are carried out as well, on the first plan's machines.
        width: D, floats of a token; bytes grow with it, rows do not.
        rows: `rank` or `pair`.
        context_width: entries of the keys and values of a token in a layer; with it, tokens also pass all layers and
            stay where their experts are, where that moves fewer bytes.
        is_woven: also pass parts of the tokens through all layers, one of which computes while others are exchanged.
        then: where the first plan goes afterwards, in at least so many `forwards`; or None.

    Returns:
        The report, on every process.

    Raises:
        RuntimeError: if outputs differ from those of whole experts.
    """
    size, first = Size(width=width), next(iter(plans.values()))
    with process_group():
        every = plans | {name: _solved(name, first, trace) for name in against}
        found: dict[str, Any] = {
            "processes": distributed.get_world_size(),
            "rows": trace.num_tokens,
            "width": width,
            "sent": rows,
            "plans": {name: _report(plan, trace, size, rows) for name, plan in every.items()},
        }
        for name, plan in every.items() if context_width is not None else ():
            found["plans"][name]["staying"] = _stayed(plan, trace, size, context_width)
        for name, plan in every.items() if is_woven else ():
            found["plans"][name]["woven"] = _woven(plan, trace, size)
        if then is not None:
            found["migration"] = migrate_live(first, then, trace, size, forwards)
    return found


def _solved(solver: str, like: Plan, trace: RoutingTrace) -> Plan:
    """A solver's plan as process 0 finds it: solvers that stop by the clock need not agree."""
    found: list[Any] = [None]
    if distributed.get_rank() == 0:
        problem = Problem.from_trace(trace, like.cluster, replicas=like.num_slots - like.num_experts)
        found = [solve(problem, solver=solver, processes=1).to_json()]
    distributed.broadcast_object_list(found, src=0)
    return Plan.from_json(found[0])


def _report(plan: Plan, trace: RoutingTrace, size: Size, rows: str) -> dict[str, Any]:
    counted = carry_out(plan, trace, size, rows=rows)
    if not counted["error"] < LARGEST_ERROR:
        raise RuntimeError(f"outputs differ from those of whole experts by {counted['error']:.2e}")
    predicted = predict(plan, trace, size)
    problem = Problem.from_trace(trace, plan.cluster, replicas=plan.num_slots - plan.num_experts)
    scored = score(problem, plan)
    routed = [int((trace.expert_TLK[:, number] >= 0).any(axis=1).sum()) for number in range(plan.num_layers)]
    return {
        "is_equal": rows == "rank" and all(map(_is_same, counted["moved"], predicted)),
        "predicted": _totals(predicted, routed),
        "counted": _totals(counted["moved"], routed) | {"remote_bytes": counted["bytes"]},
        "scored": {"gpu_fanout": scored.gpu_fanout, "balancedness": scored.balancedness},
        "largest_error": counted["error"],
        "rows": sum(moved.row_GG for moved in counted["moved"]).tolist(),
    }


def _stayed(plan: Plan, trace: RoutingTrace, size: Size, context_width: int) -> dict[str, Any]:
    found = stay_and_return(plan, trace, size, context_width)
    if not found["error"] < LARGEST_ERROR:
        raise RuntimeError(f"outputs of tokens that stay differ from those of whole experts by {found['error']:.2e}")
    return found


def _woven(plan: Plan, trace: RoutingTrace, size: Size) -> dict[str, Any]:
    found = woven_parts(plan, trace, size)
    if not (found["is_equal"] and found["error"] < LARGEST_ERROR):
        raise RuntimeError(f"woven parts differ from one after the other, or from whole experts: {found}")
    return found


def predict(plan: Plan, trace: RoutingTrace, size: Size) -> list[Moved]:
    """One `Moved` per layer, from the plan and the trace alone."""
    G = distributed.get_world_size()
    calls = calls_of(source_T(trace, G), G, size.rows_per_call)
    found = []
    for number in range(plan.num_layers):
        turns = Layer.turns_of(plan, number, trace, G)
        found.append(forecast([[trace.expert_TLK[rows, number] for rows in own] for own in calls], turns))
    return found


def _totals(moved: list[Moved], routed: list[int]) -> dict[str, float]:
    """Sums of rows, and means over layers as `place score` takes them; `routed` tokens of each layer have experts."""
    fanout = [layer.row_GG.sum() / max(tokens, 1) for layer, tokens in zip(moved, routed, strict=True)]
    return {
        "remote_rows": sum(layer.remote_rows for layer in moved),
        "remote_pairs": sum(layer.remote_pairs for layer in moved),
        "gpu_fanout": float(sum(fanout)) / len(moved),
        "balancedness": sum(layer.balancedness for layer in moved) / len(moved),
    }


def _is_same(one: Moved, other: Moved) -> bool:
    return bool((one.row_GG == other.row_GG).all() and (one.pair_GG == other.pair_GG).all())
