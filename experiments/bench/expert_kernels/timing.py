"""Times of one call: on a GPU by replaying a graph with a cold cache, on a CPU by taking turns."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

Call = Callable[[], object]
# written between two replays: twice the last cache of an MI300X (256 MiB), ten times that of an H100, so that weights
# come from memory
FLUSH_BYTES = 512 << 20
# calls before a capture, in which libraries allocate and choose algorithms; PyTorch's own examples take as many
WARM_UPS = 3
# fewer give no 20th and 80th percentile
LEAST_SAMPLES = 5


@dataclass(frozen=True)
class Times:
    """Seconds per call: median, 20th and 80th percentile, and how it was measured."""

    median_s: float
    p20_s: float
    p80_s: float
    samples: int
    is_graph: bool


def summary(samples_s: list[float], is_graph: bool) -> Times:
    """The percentiles of samples."""
    p20_s, median_s, p80_s = np.percentile(samples_s, [20, 50, 80])
    return Times(float(median_s), float(p20_s), float(p80_s), len(samples_s), is_graph)


def time_on_gpu(call: Call, *, can_be_captured: bool = True, most: int = 20, seconds: float = 2.0) -> Times:
    """Replays of a captured call, each after its weights have been pushed out of the cache.

    Args:
        call: launches work on the current device.
        can_be_captured: whether to capture it in a graph; it is called otherwise, and where it waits for the device.
        most: how many replays, fewer of slow calls.
        seconds: time to spend, roughly; at least `LEAST_SAMPLES` replays are made.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    torch.cuda.synchronize()
    samples = int(min(max(seconds / (time.perf_counter() - began), LEAST_SAMPLES), most))
    replay = _captured(call) if can_be_captured else None
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(samples)]
    for start, end in events:
        flush.zero_()
        start.record()
        (replay or call)()
        end.record()
    torch.cuda.synchronize()
    return summary([start.elapsed_time(end) / 1e3 for start, end in events], replay is not None)


def _captured(call: Call) -> Call | None:
    if _waits_for_device(call):
        return None
    graph = torch.cuda.CUDAGraph()
    try:
        # a capture that fails does not give the stream back
        with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
            call()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph.replay


def _waits_for_device(call: Call) -> bool:
    """Found out without a capture: one that fails spoils all later ones in this process (torch 2.11, allocator)."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError:
        return True
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return False


def copy_bytes_per_s() -> float:
    """What the device moves when it only copies, reads and writes counted."""
    size = 2 << 30
    source = torch.empty(size, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return 2 * size / time_on_gpu(lambda: target.copy_(source)).median_s


def peak_bytes(call: Call) -> int:
    """Device memory that a call needs beyond what is allocated before it."""
    call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def saved_bytes(forward: Call, weights: Iterable[torch.Tensor]) -> int:
    """What autograd keeps of a forward pass for its backward pass, the weights not counted.

    Args:
        forward: returns an output that requires a gradient.
        weights: tensors that are not counted: the experts' parameters.

    Returns:
        Bytes; memory that several kept tensors share counts once.
    """
    known = {weight.untyped_storage().data_ptr() for weight in weights}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = forward()
    # the graph of y has kept all that was saved alive until here, so that no address was counted for two tensors
    del y
    return sum(kept.values())


def time_in_turns(
    calls: Mapping[str, Call], seconds: float = 3.0, most: int = 200, least: int = 10
) -> dict[str, list[float]]:
    """Seconds on a CPU: A B, B A, A B, ..., so that a change of the machine's speed meets all contestants alike.

    Args:
        calls: what to time, by name.
        seconds: about how long to go on, for all together.
        most, least: bounds of the number of samples of each call.

    Returns:
        Samples by name; those of one round stand at the same place.
    """
    for call in list(calls.values()) * 2:
        call()
    samples_s: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    for taken in range(most):
        if taken >= least and time.perf_counter() > end:
            break
        # what a call leaves in caches and allocator is the next one's start: nobody always comes second
        for name in list(calls)[:: -1 if taken % 2 else 1]:
            start = time.perf_counter()
            calls[name]()
            samples_s[name].append(time.perf_counter() - start)
    return samples_s
