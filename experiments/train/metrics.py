"""Training metrics: one JSON line per step, safe to kill at any moment, and what they are computed from."""

import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from routing.ground.files import atomic_write

if TYPE_CHECKING:
    from torch import Tensor

    from routing import RouterStats


class MetricsLog:
    """Appends one line per step; a line that a kill tore off is dropped when the log is opened again.

    Args:
        file: an open text file in append mode.
    """

    def __init__(self, file: IO[str]) -> None:
        self._file = file

    def append(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(without_nan(row), allow_nan=False) + "\n")
        self._file.flush()


def without_nan(value: Any) -> Any:
    """The value with null for every number that is not finite: JSON has no word for those."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: without_nan(part) for name, part in value.items()}
    return [without_nan(part) for part in value] if isinstance(value, list | tuple) else value


@contextmanager
def open_log(path: Path, *, last_step: int) -> Iterator[MetricsLog]:
    """Open the log of a run that continues after `last_step`; later lines, if any, are dropped first."""
    if path.exists():
        kept = [row for row in read_log(path) if row["step"] <= last_step]
        with atomic_write(path) as file:
            file.writelines(json.dumps(row) + "\n" for row in kept)
    with path.open("a", encoding="utf-8") as file:
        yield MetricsLog(file)
        os.fsync(file.fileno())


def read_log(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a log, in order."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def balance_metrics(entropy: float, load_LE: NDArray[np.integer]) -> dict[str, Any]:
    """Balance of one optimiser step.

    Args:
        entropy: of the routers' distributions in its last micro-batch, mean over tokens and layers, in nats.
        load_LE: tokens that each FFN expert computed, summed over micro-batches.

    Returns:
        `max_vio` (largest over mean load minus 1, mean over layers), `dead_experts`, `router_entropy` (nats),
        `load` (share of each expert, per layer).
    """
    mean_L = np.maximum(load_LE.mean(axis=1), np.finfo(np.float64).tiny)
    share_LE = load_LE / np.maximum(load_LE.sum(axis=1, keepdims=True), 1)
    return {
        "max_vio": float((load_LE.max(axis=1) / mean_L - 1).mean()),
        "dead_experts": int((load_LE == 0).sum()),
        "router_entropy": entropy,
        "load": [[round(share, 4) for share in row] for row in share_LE.tolist()],
    }


def routing_metrics(stats: "Sequence[RouterStats]", loads: "Sequence[Tensor]") -> dict[str, Any]:
    """Metrics of routers from torch's statistics of the last micro-batch and loads [E]; empty without routers."""
    if not stats:
        return {}
    entropy = float(sum(call.entropy.item() for call in stats) / len(stats))
    return balance_metrics(entropy, np.stack([load.numpy(force=True) for load in loads]))
