"""KTransformers: `--kt-expert-placement-strategy frequency` reads `logical_count` from `--init-expert-location`.

The engine puts the globally most frequent (layer, expert) pairs on the GPU, up to `--kt-num-gpu-experts`. For a plan of
one machine the experts that the plan keeps on the GPU get counts above all others, so that exactly they are chosen.
Written as JSON; docs/engines.md shows the one line that turns it into a .pt file.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from routing.ground.files import write_json

from ..contract.plan import Plan
from .counts import whole_counts
from .reading import read_json

KEY = "logical_count"


def export_ktransformers(plan: Plan, path: Path) -> None:
    """Write `{"logical_count": [[...] per hidden layer]}`: dense layers 0, experts in order of priority.

    Raises:
        ValueError: if the plan keeps no loads and no tiers to rank experts by.
    """
    write_json(path, {KEY: _counts(plan)})


def validate_ktransformers(path: Path, plan: Plan | None = None) -> None:
    """Read the counts back: as many different ones as the plan has loads.

    Raises:
        ValueError: if they are not a table of numbers >= 0, or would choose other GPU experts than the plan.
    """
    value: Any = read_json(path)
    if not isinstance(value, dict) or list(value) != [KEY]:
        raise ValueError(f"{path}: expected exactly one key {KEY!r}")
    try:
        count = np.array(value[KEY], np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {KEY} must be a table of numbers: {error}") from error
    if count.ndim != 2 or not np.isfinite(count).all() or (count < 0).any():
        raise ValueError(f"{path}: {KEY} must be [layers, experts] of finite numbers >= 0")
    if plan is None:
        return
    if count.shape != (plan.hidden_layers, plan.num_experts):
        raise ValueError(f"{path}: expected shape {(plan.hidden_layers, plan.num_experts)}; got {count.shape}")
    _expect_distinct(path, count, plan)
    if plan.tier_LE is not None:
        moe = count[list(plan.layer_ids)]
        on_gpu = plan.tier_LE == 0
        if on_gpu.any() and (~on_gpu).any() and moe[on_gpu].min() <= moe[~on_gpu].max():
            raise ValueError(f"{path}: the engine would keep other experts on the GPU than the plan")


def _expect_distinct(path: Path, count: NDArray[np.float64], plan: Plan) -> None:
    """Counts must rank experts as the plan's loads do; equal counts for nearly equal loads are fine."""
    if plan.metadata.get("load") is None or plan.tier_LE is not None:
        return
    load_LE = np.array(plan.metadata["load"], np.float64)
    for layer, load_E in zip(plan.layer_ids, load_LE, strict=True):
        by_load = count[layer][np.argsort(load_E, kind="stable")]
        if (np.diff(by_load) < 0).any() or ((load_E > 0) != (count[layer] > 0)).any():
            raise ValueError(f"{path}: row {layer} ranks experts otherwise than the plan's loads")


def _counts(plan: Plan) -> list[list[float]]:
    if plan.homes is not None and plan.tier_LE is None:
        raise ValueError("KTransformers runs on one node; take that node's part with `expertier place part` first")
    load = plan.metadata.get("load")
    if load is None:
        if plan.tier_LE is None:
            raise ValueError("KTransformers ranks experts by load; this plan keeps none: solve it again")
        load = np.ones((plan.num_layers, plan.num_experts)).tolist()
    load_LE = whole_counts(np.array(load, np.float64))
    if plan.tier_LE is not None:
        load_LE = load_LE + np.where(plan.tier_LE == 0, load_LE.max() + 1, 0)
    count = np.zeros((plan.hidden_layers, plan.num_experts))
    count[list(plan.layer_ids)] = load_LE
    return [[float(entry) for entry in row] for row in count]
