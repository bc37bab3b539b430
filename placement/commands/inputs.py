"""What the `place` commands read: a trace or loads, rows of it, held-out data."""

from pathlib import Path
from typing import Any


def read_problem(
    trace: Path | None, loads: list[Path] | None, rows: str | None, cluster: Any, replicas: int | None, plan: Any = None
) -> Any:
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


def _named_loads(loads: list[Path], read_loads: Any, plan: Any) -> dict[str, Any]:
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
