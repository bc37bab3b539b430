"""What the `place` commands read: a trace or loads, rows of it, held-out data."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from routing.ground.expect import expect_folder

if TYPE_CHECKING:
    from ..contract.cluster import Cluster
    from ..contract.plan import Plan
    from ..contract.problem import Problem


require_folder = expect_folder  # the name under which `engines.py` imports it


def read_problem(
    trace: Path | None,
    loads: list[Path] | None,
    rows: str | None,
    cluster: "Cluster",
    replicas: int | None,
    plan: "Plan | None" = None,
) -> "Problem":
    """The problem that the data options pose.

    Args:
        trace: a routing trace, or None.
        loads: files of loads, each a scenario, or None; exactly one of both is needed.
        rows: A:B, of a trace.
        cluster: the machines, with the slots per GPU if the file gives them.
        replicas: slots per layer beyond one per expert; None takes the cluster's.
        plan: a plan that shall be judged, or None: then all-zero layers count as dense.

    Raises:
        ValueError: for both or none of trace and loads, unreadable files, and data that does not fit the cluster.
    """
    from routing.traces import RoutingTrace

    from ..contract.problem import Problem
    from ..data.loads import read_loads

    if (trace is None) == (not loads):
        raise ValueError("give either --trace FILE or --loads FILE (once or more)")
    if loads:
        if rows is not None:
            raise ValueError("--rows chooses rows of a trace; it does not go with --loads")
        return Problem.from_loads(_named_loads(loads, read_loads, plan), cluster, replicas=replicas)
    assert trace is not None
    data = RoutingTrace.load(trace)
    return Problem.from_trace(_select_rows(data, rows), cluster, replicas=replicas)


def judging_problem(plan: "Plan", trace: Path | None, loads: list[Path] | None, rows: str | None) -> "Problem":
    """The problem that judges a plan on data, on the plan's own machines."""
    return read_problem(trace, loads, rows, plan.cluster, plan.num_slots - plan.num_experts, plan)


def _named_loads(loads: list[Path], read_loads: Any, plan: "Plan | None") -> dict[str, Any]:
    """Loads by file name; for a plan, only its layers count, so that an idle layer is not taken for a dense one."""
    named = {str(path): read_loads(path) for path in loads}
    for path, load in named.items():
        if plan is not None and load.shape[0] == plan.hidden_layers:
            unused = load[list(plan.layer_ids)].sum(axis=1) == 0
            if unused.any():
                raise ValueError(f"{path}: layer {plan.layer_ids[int(unused.argmax())]} of the plan has no load there")
    return named


def _select_rows(data: Any, rows: str | None) -> Any:
    if rows is None:
        chosen = data
    else:
        parts = rows.split(":")
        try:
            start, stop = (int(part) if part else None for part in parts)
        except ValueError:
            raise ValueError(f"--rows must look like 0:20000; got {rows!r}") from None
        chosen = data.rows(start, stop)
    if chosen.num_tokens == 0:
        raise ValueError(f"no rows left: the trace has {data.num_tokens}, --rows is {rows}")
    return chosen


def read_validation(files: list[Path], problem: "Problem") -> dict[str, "Problem"]:
    """Held-out problems by file name: traces (.npz) or loads (.json)."""
    replicas = problem.num_slots - problem.num_experts
    return {
        str(file): read_problem(
            file if file.suffix == ".npz" else None,
            None if file.suffix == ".npz" else [file],
            None,
            problem.cluster,
            replicas,
        )
        for file in files
    }


def short_names(names: Iterable[str]) -> dict[str, str]:
    """Each path by its file's name, with as many folders before it as tell it from the others."""
    parts = {name: Path(name).parts for name in names}
    found = {}
    for name, own in parts.items():
        depth = 1
        while depth < len(own) and any(own[-depth:] == p[-depth:] for other, p in parts.items() if other != name):
            depth += 1
        found[name] = "/".join(own[-depth:]) if own else name
    return found
