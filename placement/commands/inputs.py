"""What the `place` commands read: a trace or loads, rows of it, held-out data."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..contract.cluster import Cluster
    from ..contract.plan import Plan
    from ..contract.problem import Problem
    from ..data.model_folder import ModelExperts

EVEN = "every expert alike"  # the name of the data where there are none


def read_problem(
    trace: Path | None,
    loads: list[Path] | None,
    rows: str | None,
    cluster: "Cluster",
    replicas: int | None,
    plan: "Plan | None" = None,
    *,
    spare_slots: bool = False,
) -> "Problem":
    """The problem that the data options pose.

    Args:
        trace: a routing trace, or None.
        loads: files of loads, each a scenario, or None; exactly one of both is needed.
        rows: A:B, of a trace.
        cluster: the machines, with the slots per GPU if the file gives them.
        replicas: slots per layer beyond one per expert; None takes the cluster's.
        plan: a plan that shall be judged, or None: then all-zero layers count as dense.
        spare_slots: round the slots up where experts do not divide over the GPUs: in tiers, slots may stay empty.

    Raises:
        ValueError: for both or none of trace and loads, unreadable files, and data that does not fit the cluster.
    """
    from routing.traces import RoutingTrace

    from ..contract.problem import Problem
    from ..data.loads import read_load_file

    if (trace is None) == (not loads):
        raise ValueError("give either --trace FILE or --loads FILE (once or more)")
    if loads:
        if rows is not None:
            raise ValueError("--rows chooses rows of a trace; it does not go with --loads")
        files = {str(path): read_load_file(path) for path in loads}
        ids = plan.layer_ids if plan is not None and _has_layers_of(plan, files) else _common_layers(files)
        tables = {name: file.load_LE for name, file in files.items()}
        if spare_slots:
            replicas = -next(iter(tables.values())).shape[1] % cluster.num_gpus
        widths = {file.experts_per_row for file in files.values()}
        if len(widths) > 1:
            raise ValueError(f"the loads files differ in the experts of their rows: {', '.join(files)}")
        counts = widths.pop()
        return Problem.from_loads(tables, cluster, replicas=replicas, layer_ids=ids, experts_per_row=counts)
    assert trace is not None
    data = RoutingTrace.load(trace)
    if plan is not None and data.layer_ids is not None and data.layer_ids != plan.layer_ids:
        raise ValueError(
            f"{trace}: recorded at decoder layers {list(data.layer_ids)}, the plan is for {list(plan.layer_ids)}"
        )
    if spare_slots:
        replicas = -data.num_experts % cluster.num_gpus
    return Problem.from_trace(_select_rows(data, rows), cluster, replicas=replicas)


def even_problem(cluster: "Cluster", found: "ModelExperts") -> "Problem":
    """The problem of a model of which only sizes are known: every expert of a layer is used as often."""
    from dataclasses import replace

    model = cluster.model.model_copy(update={"top_k": found.top_k or cluster.model.top_k})
    return _even(
        replace(cluster, model=model),
        found.experts_per_layer,
        layer_ids=found.layer_ids,
        hidden_layers=max(found.hidden_layers or 0, found.layer_ids[-1] + 1),
    )


def even_loads(plan: "Plan") -> "Problem":
    """The same problem, from a plan that was made so."""
    counts = tuple(plan.experts_L.tolist())
    return _even(plan.cluster, counts, layer_ids=plan.layer_ids, hidden_layers=plan.hidden_layers)


def _even(cluster: "Cluster", experts_per_layer: tuple[int, ...], **layers: Any) -> "Problem":
    import numpy as np

    from ..contract.problem import Problem, Scenario

    counts = np.array(experts_per_layer)
    E = int(counts.max())
    return Problem(
        cluster=cluster,
        scenarios=(Scenario(name=EVEN, load_LE=(np.arange(E) < counts[:, None]).astype(np.float64)),),
        slots_per_gpu=-(-E // cluster.num_gpus),
        experts_per_layer=experts_per_layer if np.ptp(counts) else None,
        **layers,
    )


def judging_problem(plan: "Plan", trace: Path | None, loads: list[Path] | None, rows: str | None) -> "Problem":
    """The problem that judges a plan on data, on the plan's own machines."""
    return read_problem(trace, loads, rows, plan.cluster, plan.num_slots - plan.num_experts, plan)


def _common_layers(files: dict[str, Any]) -> Any:
    """The decoder layers that the files name, which must agree."""
    named = {file.layer_ids for file in files.values()}
    if len(named) > 1:
        raise ValueError(f"the loads files name different layer_ids: {', '.join(files)}")
    return named.pop()


def _has_layers_of(plan: Any, files: dict[str, Any]) -> bool:
    """Whether the rows are the plan's decoder layers; then its layers count, also one that was idle in these loads."""
    for path, file in files.items():
        if file.load_LE.shape[0] != plan.hidden_layers or file.layer_ids not in (None, plan.layer_ids):
            return False
        unused = file.load_LE[list(plan.layer_ids)].sum(axis=1) == 0
        if unused.any():
            raise ValueError(f"{path}: layer {plan.layer_ids[int(unused.argmax())]} of the plan has no load there")
    return True


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
