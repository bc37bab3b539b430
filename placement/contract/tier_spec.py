"""What a cluster file may say about host memory, SSDs and processors of a node, and about how tiers are used."""

from typing import Annotated, Literal

from pydantic import Field

from .units import BytesPerSecond, Count, DeviceBytes, Flops, Strict


class Store(Strict):
    """A memory tier of one node; `reserve` is kept for other uses than experts."""

    size: DeviceBytes
    bandwidth: BytesPerSecond
    reserve: DeviceBytes = 0.0


class Processor(Strict):
    """How fast a node's CPUs compute experts: weights that their products read per second, and arithmetic."""

    bandwidth: BytesPerSecond | None = None
    flops: Flops | None = None


class CpuTier(Strict):
    """Experts in host memory: computed there, copied to a GPU of the node for each use, or whichever is quicker."""

    compute: bool = True
    stream: bool = True


class SsdTier(Strict):
    """Experts on the node's SSD, read for each step that uses them."""


class Tiers(Strict):
    """Which tiers may hold experts, and the steps that plans are judged by.

    `gpu: required` refuses what does not fit on the GPUs. `batch` is the tokens of one decode step over all GPUs.
    `chunk` is the tokens of one prefill chunk, which counts `chunk_weight` times as often as a decode step.
    With `peers`, one process per node computes, on the node's first GPU. The other GPUs' memory holds experts that it
    copies for each use, over NVLink or PCIe as named.
    """

    gpu: Literal["required", "optional"] = "optional"
    cpu: CpuTier | None = None
    ssd: SsdTier | None = None
    peers: Literal["nvlink", "pcie"] | None = None
    overlap: bool = True
    batch: Count = 1
    chunk: Count | None = None
    chunk_weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
