"""What the `place` commands read: a trace or loads, rows of it, held-out data."""

from pathlib import Path
from typing import Any


def read_problem(
    trace: Path | None, loads: list[Path] | None, rows: str | None, cluster: Any, replicas: int | None, plan: Any = None
) -> Any:
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
        return Problem.from_loads(tables, cluster, replicas=replicas, layer_ids=ids)
    assert trace is not None
    data = RoutingTrace.load(trace)
    if plan is not None and data.layer_ids is not None and data.layer_ids != plan.layer_ids:
        raise ValueError(
            f"{trace}: recorded at decoder layers {list(data.layer_ids)}, the plan is for {list(plan.layer_ids)}"
        )
    return Problem.from_trace(_select_rows(data, rows), cluster, replicas=replicas)


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


def require_folder(*files: Path | None) -> None:
    for file in files:
        if file is not None and not file.parent.is_dir():
            raise ValueError(f"cannot write {file}: the folder {file.parent} does not exist; create it first")


def split_by_sequence(problem: Any, share: float, seed: int) -> tuple[Any, Any]:
    """The problem of most sequences, and that of the held-out share of them.

    Raises:
        ValueError: if there is no trace, or too few sequences to split.
    """
    import numpy as np

    from ..contract.problem import Problem

    trace = problem.scenarios[0].trace
    if trace is None:
        raise ValueError("--holdout splits a trace by sequence; with --loads use --validate FILE")
    sequences = np.unique(trace.sequence_T)
    held = np.random.default_rng(seed).permutation(sequences)[: round(share * len(sequences))]
    if not 0 < share < 1 or not 0 < len(held) < len(sequences):
        raise ValueError(f"--holdout {share} of {len(sequences)} sequences leaves nothing to plan on or to check with")
    is_held = np.isin(trace.sequence_T, held)
    replicas = problem.num_slots - problem.num_experts
    return tuple(  # type: ignore[return-value]
        Problem.from_trace(trace.select(rows), problem.cluster, replicas=replicas) for rows in (~is_held, is_held)
    )


def read_validation(files: list[Path], problem: Any) -> dict[str, Any]:
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


def ordered_report(found: dict[str, Any]) -> dict[str, Any]:
    """The same report with the keys that other programs read first."""
    first = ("objective", "bound", "gap", "balancedness", "gpu_fanout", "node_fanout", "seconds")
    return {key: found[key] for key in first} | {key: value for key, value in found.items() if key not in first}
