"""What a caller of `load` asked for, checked before anything is read."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from routing.ground.expect import expect_choice, expect_name
from routing.ground.quantity import parse_size

from ..cache.catalogue import CACHES, NEEDS_FUTURE
from ..cache.depth import DepthChoice, expect_depth
from ..compute.matvec import ARITHMETICS
from ..gpu.devices import expect_device, wants_device
from ..prefetch.prefetch import PREDICTORS
from ..store.io_mode import IO_MODES

DEFAULT_POLICY = "learned"
"""The policy with the best hit rates on recorded traces; see docs/offload.md, "Which policy"."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one of several processes has of a model.

    Args:
        experts_of: told how many experts each MoE layer has, gives those that this process computes.
        has_rest: whether it has the weights outside experts; without them only the experts can be called.
    """

    experts_of: Callable[[Sequence[int]], Sequence[Sequence[int]]]
    has_rest: bool


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """The arguments of `load`, which documents them.

    Raises:
        ValueError: if one is unknown or out of range, or two contradict each other.
    """

    path_or_id: str | Path
    device: str = "auto"
    gpu_memory: str | int = "auto"
    cpu_memory: str | int = "auto"
    cache_experts: int | None = None
    gpu_experts: int | None = None
    policy: str = "auto"
    io: str = "auto"
    io_threads: int = 4
    dtype: str | torch.dtype = "auto"
    context: int = 2048
    arithmetic: str = "auto"
    pack: str | Path | None = None
    depth: int | str = "all"
    prefetch: str | Path = "auto"
    plan: str | Path | None = None
    node: int | None = None
    record_trace: bool = False
    adapter: str | Path | None = None
    resident_layers: int | None = None
    layers_ahead: int | None = None
    cache_units: int | None = None
    peer_memory: str | int | None = None
    part: Part | None = None

    def __post_init__(self) -> None:
        expect_device(self.device, self.gpu_memory, self.gpu_experts)
        for size in (self.gpu_memory, self.cpu_memory):
            if size not in ("auto", 0, "0"):
                parse_size(size)
        for name in ("cache_experts", "gpu_experts", "io_threads", "context"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}")
        for name in ("resident_layers", "layers_ahead"):
            value = getattr(self, name)
            if value is not None and (value < 0 or self.wants_gpu):
                raise ValueError(f"{name} must be 0 or more, and streams to the CPU only; got {value}")
        if self.peer_memory is not None:
            parse_size(self.peer_memory)
            if not self.wants_gpu:
                raise ValueError('peer_memory is a tier below a GPU; give device="cuda" with it')
        if self.cache_units is not None and self.cache_units < 0:
            raise ValueError(f"cache_units must be 0 or more; got {self.cache_units}")
        if self.node is not None and (self.plan is None or self.node < 0):
            raise ValueError(f"node={self.node} chooses a part of a plan of several nodes, from 0 on; give such a plan")
        if self.plan is not None and self.cache_experts is not None:
            raise ValueError("plan and cache_experts both say how many slots a layer has; give one of them")
        if self.part is not None and (self.wants_gpu or self.plan is not None or self.prefetch != "off"):
            raise ValueError("a part of a model is on the CPU, without prefetching or a plan of tiers")
        if self.adapter is not None and self.wants_gpu:
            raise ValueError("adapters of an offloaded model are computed on the CPU only; leave out the GPU, or merge")
        if self.policy in NEEDS_FUTURE:
            raise ValueError(f"policy {self.policy} needs to know the future; it is for `simulate` only")
        if self.policy != "auto":
            expect_name(self.policy, CACHES, "cache policy")
        expect_choice(self.io, IO_MODES, "io")
        expect_choice(self.arithmetic, ARITHMETICS, "arithmetic")
        expect_depth(self.depth)
        if self.depth_choice is not None and self.plan is not None:
            raise ValueError("a rule for depths divides memory itself; leave out the plan")
        if not str(self.prefetch).endswith(".npz"):
            expect_choice(str(self.prefetch), ("auto", "off", *PREDICTORS, "a predictor file (.npz)"), "prefetch")

    @property
    def depth_choice(self) -> DepthChoice | None:
        """The rule that chooses depths while the model runs; None if they are chosen at loading."""
        return DepthChoice.named(str(self.depth))

    @property
    def wants_gpu(self) -> bool:
        """Whether everything outside experts goes to a GPU."""
        return wants_device(self.device, self.gpu_memory, self.gpu_experts)

    @property
    def policy_name(self) -> str:
        """Name in CACHES."""
        return DEFAULT_POLICY if self.policy == "auto" else self.policy
