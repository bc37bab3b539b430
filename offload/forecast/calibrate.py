"""Measure what this machine can do: disk, memory, and how fast one token's products read weights.

The disk part needs no torch.
"""

import itertools
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from routing.ground.hardware import Hardware

from ..memory.huge_pages import huge_mapping

if TYPE_CHECKING:
    import torch

# O_DIRECT reads begin and end at multiples; 4096 suits disks of 512 and of 4096 bytes
BLOCK_BYTES = 4096

MEASURED_BYTES = 512 << 20
"""Of the file that is read; larger ones take longer to write first. Other sizes have no record."""
ROOM_BYTES = 256 << 20
"""That is read into, place after place: more than caches hold."""
SETTLE_S, READING_S = 1.0, 2.0
"""Shared disks give bursts at a rate that they do not keep. One read 1 MiB at 1.50 GB/s and, right after it, 16 MiB at
0.94. Half a second of reading therefore says too much. Longer times were not tried."""
# of the model whose overhead per layer is measured: small, so that Python and not weights take the time
LAYERS, CONTEXT, CALIBRATED_EXPERTS = 4, 64, 4
WIDTH = 2048
MATRIX_BYTES = 2 * WIDTH * WIDTH
WEIGHTS = 96
"""Matrices of one measurement, so that no cache holds what was read last time."""
STEPS = 25
"""Of the model whose overhead per layer is measured. Other numbers were not tried."""


def disk_bandwidth(
    file: Path, *, num_threads: int, read_bytes: int, settle_s: float = SETTLE_S, seconds: float = READING_S
) -> float:
    """Bytes per second of O_DIRECT reads of `file`, from its begin to its end again and again, once bursts are over.

    Reads go where experts go: into huge pages, and into memory that no cache holds. A virtual disk is read at little
    more than half the rate into ordinary pages, each of which is a descriptor of its own. Into the same few megabytes
    again and again it is read a third faster, because its copies then stay in the cache.

    Args:
        file: read in pieces, of which each thread takes every num_threads-th.
        num_threads: that read at the same time.
        read_bytes: of one piece.
        settle_s: first seconds, which do not count.
        seconds: that count.

    Raises:
        ValueError: if the file is smaller than a piece.
    """
    size = file.stat().st_size // BLOCK_BYTES * BLOCK_BYTES
    pieces = range(0, size - read_bytes + 1, read_bytes)
    if not pieces:
        raise ValueError(f"{file} is too small to measure with reads of {read_bytes} bytes")
    room, places = _room(max(ROOM_BYTES, read_bytes)), itertools.count()
    num_places, descriptor = len(room) // read_bytes, os.open(file, os.O_RDONLY | os.O_DIRECT)
    started = time.perf_counter()
    counted_from, until = started + settle_s, started + settle_s + seconds

    def read(first: int) -> float:
        """Bytes of this thread that landed in the time that counts; of the read at either edge, a part."""
        done, mine = 0.0, pieces[first::num_threads] or pieces
        for offset in itertools.cycle(mine):
            place = next(places) % num_places * read_bytes
            begun = time.perf_counter()
            if begun >= until:
                return done
            os.preadv(descriptor, [room[place : place + read_bytes]], offset)
            landed = time.perf_counter()
            inside = min(landed, until) - max(begun, counted_from)
            done += read_bytes * max(inside, 0.0) / (landed - begun)
        raise AssertionError("pieces are read again and again")

    try:
        with ThreadPoolExecutor(num_threads) as pool:
            return sum(pool.map(read, range(num_threads))) / seconds
    finally:
        os.close(descriptor)


def _room(nbytes: int) -> memoryview:
    """Memory as slots have it: huge pages, taken before anything is read into them."""
    room = memoryview(huge_mapping(nbytes))
    room[:] = bytes(nbytes)
    return room


def calibrate(
    folder: Path, *, num_threads: int = 4, read_bytes: int = 4 << 20, file_bytes: int = MEASURED_BYTES
) -> Hardware:
    """Measure this machine; takes some fifteen seconds and `file_bytes` of disk in `folder` for as long.

    Args:
        folder: on the disk where models are.
    """
    from .calibrate_gpu import gpu_rates

    with tempfile.NamedTemporaryFile(dir=folder, prefix="expertier-calibrate-") as scratch:
        chunk = os.urandom(1 << 20)
        for _ in range(max(file_bytes, read_bytes) >> 20):
            scratch.write(chunk)
        scratch.flush()
        os.fsync(scratch.fileno())
        file = Path(scratch.name)
        disk = disk_bandwidth(file, num_threads=num_threads, read_bytes=read_bytes)
        cached = cached_bandwidth(file, read_bytes)
    exact, fast, compressed, memory = _token_products()
    return Hardware(
        disk_bytes_per_s=disk,
        cached_bytes_per_s=cached,
        memory_bytes_per_s=memory,
        exact_bytes_per_s=exact,
        fast_bytes_per_s=fast,
        layer_s=layer_seconds(),
        compressed_bytes_per_s=compressed,
        **gpu_rates(),
    )


def cached_bandwidth(file: Path, read_bytes: int) -> float:
    """Bytes per second of buffered reads of a file that is in the page cache."""
    buffer = _room(read_bytes)
    descriptor = os.open(file, os.O_RDONLY)
    try:
        for _ in range(2):
            started, done = time.perf_counter(), 0
            while count := os.preadv(descriptor, [buffer], done):
                done += count
            seconds = time.perf_counter() - started
        return done / seconds
    finally:
        os.close(descriptor)


def layer_seconds(batch: int = 1, arithmetic: str = "auto", width: int = WIDTH) -> float:
    """Seconds that a decoder layer costs a step besides reading weights: a small offloaded model, all in memory.

    Products of as many bytes are timed in turns with the model's steps and taken off, because rates of shared machines
    change. The usual width is as good for most models: reading such weights empties the caches.

    Args:
        batch: tokens of a step; each uses all of the layer's `CALIBRATED_EXPERTS`.
        arithmetic: as for `load`.
        width: of the model, a multiple of 128.
    """
    import torch
    from transformers import AutoModelForCausalLM, OlmoeConfig

    from ..compute.resident import embedding_bytes, weight_bytes
    from ..runtime.loading import load

    config = OlmoeConfig(
        vocab_size=64, hidden_size=width, intermediate_size=512, num_hidden_layers=LAYERS,
        num_attention_heads=width // 128, num_key_value_heads=width // 128,
        num_experts=CALIBRATED_EXPERTS, num_experts_per_tok=CALIBRATED_EXPERTS,
        eos_token_id=None, pad_token_id=None, dtype="bfloat16",
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        model = model.to_empty(device="cpu").bfloat16()
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.02)
        nbytes = weight_bytes(model) - embedding_bytes(model)
        model.save_pretrained(folder)
        model = load(folder, cache_experts=CALIBRATED_EXPERTS, arithmetic=arithmetic)
        past = model(torch.ones(batch, CONTEXT, dtype=torch.long), use_cache=True).past_key_values
        token = torch.ones(batch, 1, dtype=torch.long)
        count = nbytes // MATRIX_BYTES
        products = Products(batch, square_matrices(count))
        besides = []
        for _ in range(STEPS + 1):  # the first one is not used to anything
            step_s = _seconds(lambda: model(token, past_key_values=past, use_cache=True))
            besides.append(step_s - _seconds(products) * nbytes / (count * MATRIX_BYTES))
        model.offload.close()
    return max(median(besides[1:]), 0.0) / LAYERS


class Products:
    """Products of a few rows with square matrices, one after the other.

    Args:
        rows: of the other factor.
        weights: plain or stored, `WIDTH` wide.
        arithmetic: of them.
    """

    def __init__(self, rows: int, weights: "Sequence[torch.Tensor]", arithmetic: str = "exact") -> None:
        import torch

        from ..compute.matvec import Matvecs

        self._weights, self._matvecs, self._mm = weights, Matvecs(arithmetic), torch.mm
        self._x, self._out = torch.randn(rows, WIDTH).bfloat16(), torch.empty(rows, WIDTH, dtype=torch.bfloat16)

    def __call__(self) -> None:
        for weight in self._weights:
            if not self._matvecs.multiply(self._x, (weight,), (self._out,)):
                self._mm(self._x, weight.t(), out=self._out)


def square_matrices(count: int) -> "list[torch.Tensor]":
    """Random bfloat16 matrices of `MATRIX_BYTES` each."""
    import torch

    return [torch.randn(WIDTH, WIDTH).bfloat16() for _ in range(count)]


def _token_products() -> tuple[float, float, float, float]:
    """Bytes per second of single tokens' products, exact, fast and of compressed weights, and of plain reading."""
    import torch
    from torch import nn

    from ..compute.resident import store_linears, weight_bytes
    from ..formats.compression import CompressedMatrix

    weights, total = square_matrices(WEIGHTS), WEIGHTS * MATRIX_BYTES
    exact = total / _median_s(Products(1, weights))
    memory = total / _median_s(lambda: [weight.view(torch.int64).sum() for weight in weights])
    try:
        fast = total / _median_s(Products(1, weights, "fast"))
    except ValueError:
        fast = 0.0
    model = nn.ModuleList([nn.Linear(WIDTH, WIDTH, bias=False, dtype=torch.bfloat16) for _ in weights])
    store_linears(model, CompressedMatrix())
    compressed = weight_bytes(model) / _median_s(Products(1, [linear.weight for linear in model]))
    return exact, fast, compressed, memory


def _median_s(run: Callable[[], object], times: int = 9) -> float:
    run()
    return median(_seconds(run) for _ in range(times))


def _seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started
