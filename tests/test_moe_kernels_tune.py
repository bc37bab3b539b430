"""The tuner, with stand-in times: what it chooses, what it keeps, and what it refuses to read."""

import json
from dataclasses import asdict

import pytest
import torch

pytest.importorskip("triton")

import triton
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from moe.kernels import ExpertWeights, quantise
from moe.kernels.launching import tuned
from moe.kernels.launching.launch import is_interpreted
from moe.kernels.launching.tiles import LayerTiles, Tile, table_tiles
from moe.kernels.launching.tuned import TunedFor, chosen_tiles, tuned_file, tuned_tiles
from moe.kernels.tuning.tune import PRODUCTS, measure_on_device, save_tuned, tune
from moe.kernels.weights.activation import Activation

TILES = LOW, LOW_WIDE, HIGH = Tile(16, 32, 16, 4, 1), Tile(16, 64, 16, 4, 1), Tile(32, 32, 16, 4, 1)
NAMES = {
    "up": ("BLOCK_M", "BLOCK_OUT"),
    "down": ("BLOCK_M", "BLOCK_OUT"),
    "grad_activation": ("BLOCK_M", "BLOCK_IN"),
    "grad_input": ("BLOCK_M", "BLOCK_IN"),
    "grad_weight": ("BLOCK_OUT", "BLOCK_IN"),
}
DEVICE_NAME = "A Device/1"

pytestmark = pytest.mark.skipif(not is_interpreted(), reason="stand-in times belong to the interpreter")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tuned_tiles.cache_clear()
    yield
    tuned_tiles.cache_clear()


def tuned_with(seconds):
    """Tune with a table of seconds by (product, tile); products that are not named take 1 s with every tile."""
    product_of = {kernel: product for product, kernel in PRODUCTS.items()}
    measured = []

    def measure(launch):
        given = launch.arguments
        product = product_of[launch.kernel.__name__]
        measured.append(product)
        # block_m and block_n of the tile, by the names that this kernel has for them
        rows, columns = NAMES[product]
        factor = 2 if product == "grad_activation" else 1
        size = given[rows], factor * given[columns]
        tile = next(tile for tile in TILES if (tile.block_m, tile.block_n) == size)
        return seconds.get((product, tile), 1.0)

    weights = ExpertWeights(torch.randn(3, 32, 16), torch.randn(3, 16, 16))
    expert_TK = torch.tensor([[0, 1], [1, 2], [0, 2]])
    planned = []
    best = tune(
        weights, torch.randn(3, 16), expert_TK, torch.rand(3, 2),
        candidates=TILES, measure=measure, prepare=lambda launches: planned.extend(launches),
    )  # fmt: skip
    assert {launch.kernel.__name__ for launch in planned} >= set(PRODUCTS.values())
    return best, measured


def test_products_that_share_a_tile_map_agree_on_their_rows():
    # alone, up is fastest low and down is fastest high; together they are fastest low
    seconds = {("up", LOW_WIDE): 0.1, ("up", HIGH): 0.6, ("down", LOW): 0.4, ("down", HIGH): 0.2}
    best, measured = tuned_with(seconds)
    assert (best.up, best.down) == (LOW_WIDE, LOW)
    assert set(measured) == set(PRODUCTS)


def test_the_gradient_of_weights_is_chosen_alone():
    best, _ = tuned_with({("grad_weight", HIGH): 0.5, ("grad_input", LOW): 0.1, ("grad_activation", HIGH): 0.95})
    assert best.grad_weight == HIGH
    assert best.grad_input == LOW
    assert best.grad_activation.block_m == LOW.block_m


def test_tiles_that_fit_no_device_are_refused():
    seconds = {("down", tile): float("inf") for tile in TILES}
    with pytest.raises(ValueError, match="no candidate tile fits this device"):
        tuned_with(seconds)


@pytest.mark.parametrize(
    "error",
    [
        OutOfResources(300_000, 232_448, "shared memory"),
        CompilationError("", None, "too wide"),
        PTXASError("registers"),
    ],
    ids=["memory", "compiler", "assembler"],
)
def test_a_tile_that_a_device_refuses_never_wins(monkeypatch, error):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(triton.testing, "do_bench", refuse)
    assert measure_on_device(None) == float("inf")


def test_errors_that_are_no_misfit_are_not_swallowed(monkeypatch):
    def crash(*_, **__):
        raise RuntimeError("illegal memory access")

    monkeypatch.setattr(triton.testing, "do_bench", crash)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        measure_on_device(None)


def uniform(tile):
    return LayerTiles(tile, tile, tile, tile, tile)


def layer(width, features, slots=8):
    return ExpertWeights(
        *(torch.empty(size, device="meta") for size in ((slots, 2 * features, width), (slots, width, features)))
    )


def test_kept_tiles_come_back_beside_earlier_ones_and_go_before_the_table(monkeypatch):
    save_tuned(DEVICE_NAME, torch.bfloat16, 1000.0, layer(512, 256), uniform(LOW))
    save_tuned(DEVICE_NAME, torch.bfloat16, 20.0, layer(512, 256), uniform(HIGH))
    assert tuned_tiles(DEVICE_NAME) == {
        TunedFor("half", "many", 512, 256): uniform(LOW),
        TunedFor("half", "few", 512, 256): uniform(HIGH),
    }
    assert not tuned_tiles("Another")
    _pretend_a_device(monkeypatch)
    device = torch.device("cuda", 7)
    given = layer(512, 256)
    assert chosen_tiles(device, torch.float16, 8 * 1000, given) == uniform(LOW)
    assert chosen_tiles(device, torch.float16, 8 * 100, given) == table_tiles("sm90", "half", "some")
    assert chosen_tiles(device, torch.float32, 8 * 1000, given) == table_tiles("sm90", "single", "many")


def test_weights_that_are_dequantised_take_smaller_tiles(monkeypatch):
    _pretend_a_device(monkeypatch)
    device = torch.device("cuda", 7)
    codes = [quantise(torch.zeros(1, 128, 128), "int8") for _ in range(2)]
    given = ExpertWeights(*codes, activation=Activation("relu2", gated=False))
    many, some = (chosen_tiles(device, torch.bfloat16, rows, given) for rows in (1000, 100))
    assert many == table_tiles("sm90", "half", "many", is_quantised=True) != table_tiles("sm90", "half", "many")
    assert some == table_tiles("sm90", "half", "some")


def test_of_several_tuned_layers_the_most_similar_counts(monkeypatch):
    save_tuned(DEVICE_NAME, torch.bfloat16, 1000.0, layer(2048, 768), uniform(LOW))
    save_tuned(DEVICE_NAME, torch.bfloat16, 1000.0, layer(4096, 14336), uniform(HIGH))
    _pretend_a_device(monkeypatch)
    device = torch.device("cuda", 7)
    assert chosen_tiles(device, torch.bfloat16, 8000, layer(2048, 1024)) == uniform(LOW)
    assert chosen_tiles(device, torch.bfloat16, 8000, layer(4096, 8192)) == uniform(HIGH)


def _pretend_a_device(monkeypatch):
    monkeypatch.setattr(tuned, "is_interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: DEVICE_NAME)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


@pytest.mark.parametrize(("rows", "lowest", "highest"), [(4, 16, 64), (100, 32, 128), (1000, 64, 128)])
def test_candidates_suit_the_rows_per_expert(rows, lowest, highest):
    tried = set()

    def measure(launch):
        return 1.0

    def note(launches):
        tried.update(launch.arguments["BLOCK_M"] for launch in launches if launch.kernel.__name__ == "down_kernel")
        raise StopIteration

    expert_TK = torch.zeros(rows, 1, dtype=torch.int64)
    with pytest.raises(StopIteration):
        tune(layer(16, 16, 1), torch.empty(rows, 16), expert_TK, torch.empty(rows, 1), measure=measure, prepare=note)
    assert (min(tried), max(tried)) == (lowest, highest)


LAYER = {"numbers": "half", "rows": "few", "width": 64, "features": 32}


@pytest.mark.parametrize(
    "content",
    [
        "not json",
        "{}]",
        json.dumps([{"layer": LAYER}]),
        json.dumps([{"layer": LAYER, "tiles": {"up": {"block_m": 17}}}]),
        json.dumps([{"layer": LAYER | {"rows": "some more"}, "tiles": asdict(uniform(LOW))}]),
        json.dumps({"numbers": "half"}),
        " " * (2 << 20),
    ],
    ids=["text", "broken", "missing", "incomplete", "unknown-rows", "mapping", "large"],
)
def test_a_file_that_is_none_is_named(content):
    path = tuned_file(DEVICE_NAME)
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with pytest.raises(ValueError, match="is not a file of tuned tiles"):
        tuned_tiles(DEVICE_NAME)


@pytest.mark.parametrize("size", [{"block_m": 24}, {"block_k": 8}, {"num_stages": 0}, {"block_n": 64.0}])
def test_sizes_that_are_no_tile_are_refused(size):
    with pytest.raises(ValueError, match="powers of two"):
        Tile(**({"block_m": 16, "block_n": 16, "block_k": 16, "num_warps": 4, "num_stages": 1} | size))
