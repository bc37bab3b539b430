"""Measure what this machine can do: disk, memory, and how fast one token's products read weights.

The disk part needs no torch.
"""

import itertools
import mmap
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

from routing.ground.hardware import Hardware

# O_DIRECT reads begin and end at multiples; 4096 suits disks of 512 and of 4096 bytes
BLOCK_BYTES = 4096

MEASURED_BYTES = 512 << 20
"""Of the file that is read; larger ones take longer to write first. Other sizes have no record."""
SETTLE_S, READING_S = 1.0, 2.0
"""Shared disks give bursts at a rate that they do not keep. One read 1 MiB at 1.50 GB/s and, right after it, 16 MiB at
0.94. Half a second of reading therefore says too much. Longer times were not tried."""
# of the model whose overhead per layer is measured: small, so that Python and not weights take the time
LAYERS, CONTEXT, CALIBRATED_EXPERTS = 4, 64, 4
WEIGHTS = 96
"""Of 8 MiB each, so that no cache holds what was read last time."""


def disk_bandwidth(
    file: Path, *, num_threads: int, read_bytes: int, settle_s: float = SETTLE_S, seconds: float = READING_S
) -> float:
    """Bytes per second of O_DIRECT reads of `file`, from its begin to its end again and again, once bursts are over.

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
    descriptor = os.open(file, os.O_RDONLY | os.O_DIRECT)
    started = time.perf_counter()
    counted_from, until = started + settle_s, started + settle_s + seconds

    def read(first: int) -> float:
        """Bytes of this thread that landed in the time that counts; of the read at either edge, a part."""
        buffer, done, mine = memoryview(mmap.mmap(-1, read_bytes)), 0.0, pieces[first::num_threads] or pieces
        for offset in itertools.cycle(mine):
            begun = time.perf_counter()
            if begun >= until:
                return done
            os.preadv(descriptor, [buffer], offset)
            landed = time.perf_counter()
            inside = min(landed, until) - max(begun, counted_from)
            done += read_bytes * max(inside, 0.0) / (landed - begun)
        raise AssertionError("pieces are read again and again")

    try:
        with ThreadPoolExecutor(num_threads) as pool:
            return sum(pool.map(read, range(num_threads))) / seconds
    finally:
        os.close(descriptor)


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
        layer_s=layer_seconds(exact),
        compressed_bytes_per_s=compressed,
        **gpu_rates(),
    )


def cached_bandwidth(file: Path, read_bytes: int) -> float:
    """Bytes per second of buffered reads of a file that is in the page cache."""
    buffer = memoryview(mmap.mmap(-1, read_bytes))
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


def layer_seconds(bytes_per_s: float, batch: int = 1, arithmetic: str = "auto") -> float:
    """Seconds that a decoder layer costs a step besides reading weights: a small offloaded model, all in memory.

    Its weights are of a usual width, because reading them empties the caches that everything else would run from.

    Args:
        bytes_per_s: at which products of so many rows read weights.
        batch: tokens of a step; each uses all of the layer's `CALIBRATED_EXPERTS`.
        arithmetic: as for `load`.
    """
    import torch
    from transformers import AutoModelForCausalLM, OlmoeConfig

    from ..compute.resident import embedding_bytes, weight_bytes
    from ..runtime.loading import load

    config = OlmoeConfig(
        vocab_size=64, hidden_size=2048, intermediate_size=512, num_hidden_layers=LAYERS, num_attention_heads=16,
        num_key_value_heads=16, num_experts=CALIBRATED_EXPERTS, num_experts_per_tok=CALIBRATED_EXPERTS,
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
        seconds = _median_s(lambda: model(token, past_key_values=past, use_cache=True), times=25)
        model.offload.close()
    return max(seconds - nbytes / bytes_per_s, 0.0) / LAYERS


def _token_products() -> tuple[float, float, float, float]:
    """Bytes per second of single tokens' products, exact, fast and of compressed weights, and of plain reading."""
    import torch
    from torch import nn

    from ..compute.matvec import Matvecs
    from ..compute.resident import store_linears, weight_bytes
    from ..formats.compression import CompressedMatrix

    weights = [torch.randn(2048, 2048).bfloat16() for _ in range(WEIGHTS)]
    x, out = torch.randn(1, 2048).bfloat16(), torch.empty(1, 2048, dtype=torch.bfloat16)
    total = sum(weight.nbytes for weight in weights)

    def each(run: Callable[[torch.Tensor], object], weights: Sequence[torch.Tensor], nbytes: int) -> float:
        def once() -> None:
            for weight in weights:
                run(weight)

        return nbytes / _median_s(once)

    def product(matvecs: Matvecs) -> Callable[[torch.Tensor], object]:
        return lambda weight: matvecs.multiply(x, (weight,), (out,)) or torch.mm(x, weight.t(), out=out)

    exact = each(product(Matvecs("exact")), weights, total)
    memory = each(lambda weight: weight.view(torch.int64).sum(), weights, total)
    try:
        fast = each(product(Matvecs("fast")), weights, total)
    except ValueError:
        fast = 0.0
    model = nn.ModuleList([nn.Linear(2048, 2048, bias=False, dtype=torch.bfloat16) for _ in weights])
    store_linears(model, CompressedMatrix())
    compressed = each(product(Matvecs("exact")), [linear.weight for linear in model], weight_bytes(model))
    return exact, fast, compressed, memory


def _median_s(run: Callable[[], object], times: int = 9) -> float:
    run()
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return median(seconds)
