"""Choose tiles by measuring, on request; the result is written where `tuned.chosen_tiles` finds it.

Each matrix product of a layer is timed on its own, with every candidate; products that share a tile map must agree on
their rows per tile, so the best pair for each number of rows is compared.

Shapes: T tokens, K experts per token.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
import triton
from torch import Tensor
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from routing.ground.files import write_json

from ..grouped.backward import Needs, backward
from ..grouped.forward import forward
from ..launching.launch import Launch, execute
from ..launching.tiles import LayerTiles, Tile, number_format, row_class, uniform_tiles
from ..launching.tuned import TunedFor, tuned_document, tuned_file, tuned_tiles
from ..weights.weights import ExpertWeights
from .planned import compile_together, layer_launches

Measure = Callable[[Launch], float]

# sizes that compile without spills for the products of the table; the tuner has not run on a GPU yet
CANDIDATES = tuple(
    Tile(block_m, block_n, block_k, num_warps, num_stages)
    for block_m, block_n, num_warps in (
        (16, 64, 4),
        (16, 128, 4),
        (32, 128, 4),
        (64, 64, 4),
        (64, 128, 4),
        (64, 256, 8),
        (128, 64, 4),
        (128, 128, 4),
        (128, 128, 8),
        (128, 256, 8),
    )
    for block_k, num_stages in ((32, 4), (64, 3), (64, 4))
)
# rows per tile that are worth trying in each class of rows per expert
BLOCKS_M = {"few": (16, 32, 64), "some": (32, 64, 128), "many": (64, 128)}
# too much shared memory or too many threads; refused by the compiler; refused by the assembler
MISFITS = (OutOfResources, CompilationError, PTXASError)
PRODUCTS = {
    "up": "up_kernel",
    "down": "down_kernel",
    "grad_activation": "grad_activation_kernel",
    "grad_input": "grad_input_kernel",
    "grad_weight": "grad_weight_kernel",
}


def measure_on_device(launch: Launch) -> float:
    """Median milliseconds of a launch with a cold cache; infinite for tiles that do not fit the device."""
    try:
        return triton.testing.do_bench(lambda: execute(launch), warmup=5, rep=20, return_mode="median")
    except MISFITS:
        return float("inf")


def tune(
    weights: ExpertWeights,
    x_TD: Tensor,
    expert_TK: Tensor,
    combine_TK: Tensor,
    *,
    candidates: Sequence[Tile] | None = None,
    measure: Measure = measure_on_device,
    prepare: Callable[[Iterable[Launch]], None] = compile_together,
) -> LayerTiles:
    """The fastest tiles for this layer and these tokens.

    Args:
        weights: dense experts on the device to tune for.
        x_TD, expert_TK, combine_TK: an input that is typical of its row class.
        candidates: tiles to try; by default those of `CANDIDATES` that suit the rows per expert.
        measure: the time of a launch, in any unit.
        prepare: is given all launches beforehand.

    Raises:
        ValueError: if no candidate fits the device.
    """
    if candidates is None:
        blocks_m = BLOCKS_M[row_class(expert_TK.numel() / weights.num_slots)]
        candidates = [tile for tile in CANDIDATES if tile.block_m in blocks_m]
    prepare(_planned(weights, expert_TK, x_TD.dtype, candidates))
    time_s = {product: {} for product in PRODUCTS}
    for tile in candidates:
        uniform = uniform_tiles(tile)
        for product, seconds in _times(weights, x_TD, expert_TK, combine_TK, uniform, measure).items():
            time_s[product][tile] = seconds
    up, down = _best_pair(time_s["up"], time_s["down"])
    grad_activation, grad_input = _best_pair(time_s["grad_activation"], time_s["grad_input"])
    grad_weight = min(time_s["grad_weight"], key=time_s["grad_weight"].__getitem__)
    return LayerTiles(up, down, grad_activation, grad_input, grad_weight)


def _planned(
    weights: ExpertWeights, expert_TK: Tensor, dtype: torch.dtype, candidates: Sequence[Tile]
) -> Iterator[Launch]:
    on_meta = replace(weights, up=weights.up.to("meta"), down=weights.down.to("meta"))
    for tile in candidates:
        yield from layer_launches(on_meta, *expert_TK.shape, dtype, uniform_tiles(tile), trains=True)


def _times(
    weights: ExpertWeights,
    x_TD: Tensor,
    expert_TK: Tensor,
    combine_TK: Tensor,
    tiles: LayerTiles,
    measure: Measure,
) -> dict[str, float]:
    """Time of each product of a training step; the other kernels are only run."""
    product_of = {kernel: product for product, kernel in PRODUCTS.items()}
    times = dict.fromkeys(PRODUCTS, 0.0)

    def run(launch: Launch) -> None:
        product = product_of.get(launch.kernel.__name__)
        if product is None:
            execute(launch)
        else:
            times[product] += measure(launch)

    with torch.no_grad():
        y_TD, pre_NO, groups = forward(x_TD, expert_TK, combine_TK, weights, tiles, run, saves=True)
        backward(y_TD, x_TD, combine_TK, pre_NO, groups, weights, Needs(), tiles, run)
    return times


def _best_pair(first: Mapping[Tile, float], second: Mapping[Tile, float]) -> tuple[Tile, Tile]:
    pairs = [(a, b) for a, b in itertools.product(first, second) if a.block_m == b.block_m]
    best = min(pairs, key=lambda pair: first[pair[0]] + second[pair[1]])
    if first[best[0]] + second[best[1]] == float("inf"):
        raise ValueError("no candidate tile fits this device; pass smaller ones")
    return best


def save_tuned(
    device_name: str, dtype: torch.dtype, rows_per_expert: float, weights: ExpertWeights, tiles: LayerTiles
) -> None:
    """Add tiles to the device's file; later calls of `chosen_tiles`, in this process too, use them.

    Args:
        device_name: as `torch.cuda.get_device_name` gives it.
        dtype, rows_per_expert, weights: what they were tuned for.
        tiles: the result of `tune`.
    """
    layer = TunedFor(number_format(dtype), row_class(rows_per_expert), weights.width, weights.num_features)
    tuned = tuned_tiles(device_name) | {layer: tiles}
    path = tuned_file(device_name)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, tuned_document(tuned))
    tuned_tiles.cache_clear()
