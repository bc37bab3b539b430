"""Any-shape subnets: how layers and units are chosen, and one tuning for all shapes against one for each.

Shapes: L layers, F hidden units.
"""

from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np

from ..claim import Row, fit
from ..domains import bits_per_byte, dense_model, rows_of, tune

if TYPE_CHECKING:
    from torch import Tensor

DOMAINS = ("prose", "python")
# toy sizes: nine shapes that a core tunes in minutes, chosen once
LAYERS, WIDTH = 6, 96
MOST_DROPPED = 2
"""Layers that the shallowest shape lacks: a third, as in the paper's 32 to 20."""
WIDTHS = (96, 72, 48)
"""Down to half; the paper's go from 1 to 5/8."""
CALIBRATION_BATCHES = 4
"""The paper's 40 to 512 samples are many times longer."""
RATE = 5e-3
"""Of adapters; not tuned."""
THE_MODEL, CHOSEN, EVENLY = "the model", "chosen, not tuned", "evenly, not tuned"
TUNED, ONE_ADAPTER, UNBALANCED = "mixture by shape", "one adapter of its size", "without balance"
APART = "each shape apart"


def shape_rows(steps: int, seed: int) -> list[Row]:
    """Bits per byte over the shapes: mean, the full one's, the smallest one's."""
    from moe import ShapePlan

    model = dense_model(WIDTH, seed, num_hidden_layers=LAYERS)
    tune(model, DOMAINS, 4 * steps, seed)
    model.requires_grad_(False)
    importance_LF, dropped = _calibrated(model, seed)
    spread = [frozenset(), frozenset({LAYERS // 2}), frozenset({LAYERS // 3, 2 * LAYERS // 3})]
    plans = {
        TUNED: ShapePlan(),
        ONE_ADAPTER: ShapePlan(adapters=1, adapters_used=1, rank=ShapePlan().adapters * ShapePlan().rank),
        UNBALANCED: ShapePlan(balances=False),
    }
    full = _bits(model)
    rows = [
        {"variant": THE_MODEL, "bits_mean": None, "bits_full": full, "bits_smallest": None},
        _row(CHOSEN, _elastic(model, importance_LF, dropped, seed)),
        _row(EVENLY, _elastic(model, _numbered(importance_LF), spread, seed)),
    ]
    for name, plan in plans.items():
        elastic = _elastic(model, importance_LF, dropped, seed, plan)
        _tune(elastic, steps, seed)
        rows.append(_row(name, elastic))
    return [*rows, _apart(model, importance_LF, dropped, steps, seed)]


def _calibrated(model: Any, seed: int) -> tuple["Tensor", list[frozenset[int]]]:
    """Units by importance, and layers by the loss that the model has without them, on some training rows."""
    import torch

    from moe import Subnet, carve, droppable_layers, unit_importance

    draws = np.random.default_rng(10_000 + seed)
    token_BS = torch.cat([rows_of(DOMAINS, draws) for _ in range(CALIBRATION_BATCHES)])
    every = torch.arange(WIDTH)

    @torch.no_grad()
    def loss_without(gone: frozenset[int]) -> float:
        kept = tuple(layer for layer in range(LAYERS) if layer not in gone)
        cut = carve(model, Subnet(kept, (every,) * len(kept)))
        return cut(token_BS, labels=token_BS, use_cache=False).loss.item()

    return unit_importance(model, token_BS), droppable_layers(loss_without, LAYERS, MOST_DROPPED)


def _numbered(importance_LF: "Tensor") -> "Tensor":
    """As if the first units were the most important: those of an untrained order."""
    import torch

    return torch.arange(importance_LF.shape[1], 0, -1.0).expand_as(importance_LF)


def _elastic(model: Any, importance_LF: "Tensor", dropped: list[frozenset[int]], seed: int, plan: Any = None) -> Any:
    from moe import ElasticModel, ShapePlan

    return ElasticModel(model, importance_LF, dropped, WIDTHS, plan or ShapePlan(), seed).eval()


def _tune(elastic: Any, steps: int, seed: int) -> None:
    draws = np.random.default_rng(seed)
    elastic.train()
    fit(elastic.parameters(), lambda step: elastic.loss(rows_of(DOMAINS, draws)), steps, RATE)
    elastic.eval()


def _apart(model: Any, importance_LF: "Tensor", dropped: list[frozenset[int]], steps: int, seed: int) -> Row:
    """Every shape with adapters of its own, tuned as the only one: all of the steps for each of them."""
    import torch

    from moe import ElasticModel, ShapePlan, carve

    shapes = _elastic(model, importance_LF, dropped, seed).subnets
    lone = ShapePlan(adapters=1, adapters_used=1, rank=ShapePlan().adapters * ShapePlan().rank, sampled=0)
    bits = {}
    for shape, subnet in shapes.items():
        cut = carve(model, subnet)
        own = ElasticModel(cut, torch.ones(shape), [frozenset()], shape[1:], lone, seed)
        _tune(own, steps, seed)
        bits[shape] = _bits(own.extract(own.largest))
    return _means(APART, bits)


def _row(name: str, elastic: Any) -> Row:
    return _means(name, {shape: _bits(elastic.extract(shape)) for shape in elastic.subnets})


def _means(name: str, bits: dict[tuple[int, int], float]) -> Row:
    return {
        "variant": name,
        "bits_mean": fmean(bits.values()),
        "bits_full": bits[LAYERS, WIDTH],
        "bits_smallest": bits[LAYERS - MOST_DROPPED, WIDTHS[-1]],
    }


def _bits(model: Any) -> float:
    return fmean(bits_per_byte(model, name) for name in DOMAINS)
