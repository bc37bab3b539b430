"""Reading expert loads: JSON with `logical_count`, as SGLang's `--init-expert-location` takes it."""

import json
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float64]
MAX_LOADS_BYTES = 1 << 30


def read_loads(path: str | os.PathLike[str]) -> Float:
    """Loads [hidden layers, E] from a JSON file `{"logical_count": [[...]]}`; [steps, L, E] is summed over steps.

    Raises:
        ValueError: if the file is missing, too large, or not such a table of finite numbers >= 0.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"loads {path}: no such file")
    if file.stat().st_size > MAX_LOADS_BYTES:
        raise ValueError(f"loads {path}: larger than {MAX_LOADS_BYTES} bytes")
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"loads {path}: not readable as JSON: {error}") from error
    if not isinstance(value, dict) or "logical_count" not in value:
        raise ValueError(f'loads {path}: expected {{"logical_count": [[...]]}} with one row per layer')
    try:
        load = np.array(value["logical_count"], np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"loads {path}: logical_count must be a rectangular table of numbers: {error}") from error
    if load.ndim == 3:
        load = load.sum(axis=0)
    if load.ndim != 2 or 0 in load.shape:
        raise ValueError(f"loads {path}: logical_count must be [layers, experts]; got shape {load.shape}")
    if not np.all(np.isfinite(load)) or np.any(load < 0):
        raise ValueError(f"loads {path}: logical_count must be finite and not negative")
    return load
