"""What a cluster file may say: pydantic models, unknown keys refused, quantities in SI units once read."""

from itertools import pairwise
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from .tier_spec import Processor, Store, Tiers
from .units import Bytes, BytesPerSecond, Count, DeviceBytes, Flops, Positive, Seconds, Share, Strict

# bytes of one stored weight
DTYPE_BYTES = {"fp4": 0.5, "fp8": 1.0, "int8": 1.0, "bf16": 2.0, "fp16": 2.0, "fp32": 4.0}


class ModelSpec(Strict):
    """The model whose experts are placed; everything is optional, but latency and memory need sizes."""

    name: str = ""
    moe_layers: Count | None = None
    first_moe_layer: Annotated[int, Field(ge=0)] = 0
    hidden_layers: Count | None = None
    experts: Count | None = None
    experts_per_layer: list[Count] | None = None
    top_k: Count | None = None
    expert_groups: Count = 1
    topk_groups: Count | None = None
    hidden: Count | None = None
    moe_intermediate: Count | None = None
    dtype: Literal["fp4", "fp8", "int8", "bf16", "fp16", "fp32"] = "fp8"
    expert_bytes: Bytes | None = None
    dispatch_bytes: Bytes | None = None
    combine_bytes: Bytes | None = None

    @property
    def bytes_per_expert(self) -> float | None:
        """`expert_bytes`, else three matrices of hidden x moe_intermediate in `dtype`; None without those sizes."""
        if self.expert_bytes is not None or self.hidden is None or self.moe_intermediate is None:
            return self.expert_bytes
        return 3 * self.hidden * self.moe_intermediate * DTYPE_BYTES[self.dtype]


class GpuType(Strict):
    """One kind of GPU; `expert_seconds` are measured seconds of one expert by its rows, instead of rates."""

    memory: DeviceBytes | None = None
    hbm: BytesPerSecond = 3.35e12
    flops: dict[str, Flops] = Field(default_factory=lambda: {"bf16": 989e12})
    efficiency: Share = 0.6
    expert_seconds: dict[Count, Seconds] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _more_rows_are_no_slower_each(self) -> Self:
        """A curve that pays for splitting an expert's rows would make bounds of plans with copies invalid."""
        points = sorted(self.expert_seconds.items())
        for (rows, seconds), (more_rows, more_seconds) in pairwise(points):
            if more_seconds < seconds or more_seconds / more_rows > seconds / rows:
                raise ValueError(
                    f"expert_seconds must not fall with rows, and seconds per row must not rise; got {seconds:g} s for "
                    f"{rows} rows and {more_seconds:g} s for {more_rows}"
                )
        return self


class GpusOfNode(Strict):
    """Which GPUs sit in a node."""

    type: str | None = None
    count: Count


class Nic(Strict):
    """Network cards of one node, one per GPU by default; bandwidth is one card's, one direction."""

    count: Count | None = None
    bandwidth: BytesPerSecond = 50e9


class NodeType(Strict):
    """One kind of node."""

    gpus: GpusOfNode
    nvlink: BytesPerSecond = 450e9
    nic: Nic = Nic()
    pcie: BytesPerSecond = 64e9
    cpu: Processor = Processor()
    dram: Store | None = None
    ssd: Store | None = None


class GpuOverride(Strict):
    """What differs for one GPU of a node: its type, its relative speed, memory kept for other uses."""

    type: str | None = None
    speed: Positive = 1.0
    reserve: DeviceBytes = 0.0


class NodeGroup(Strict):
    """`count` equal nodes; `gpus` overrides single GPUs by their index within the node."""

    type: str
    count: Count = 1
    rack: str = "r0"
    speed: Positive = 1.0
    reserve: DeviceBytes = 0.0
    gpus: dict[int, GpuOverride] = Field(default_factory=dict)


class InterNode(Strict):
    """Between nodes; `nic` as bandwidth means what the node's cards give."""

    latency: Seconds = 5e-6
    bandwidth: Literal["nic"] | BytesPerSecond = "nic"


class InterRack(Strict):
    """Between racks: a GPU's share is bandwidth / oversubscription."""

    latency: Seconds = 0.0
    bandwidth: BytesPerSecond = 50e9
    oversubscription: Annotated[float, Field(ge=1)] = 1.0


class Links(Strict):
    """How nodes and racks are joined; `rank_cost_matrix` is a relative cost per byte between GPUs, zero diagonal."""

    inter_node: InterNode = InterNode()
    inter_rack: InterRack | None = None
    rank_cost_matrix: list[list[Annotated[float, Field(ge=0, allow_inf_nan=False)]]] | None = None


class ExpertParallel(Strict):
    """How the engine runs experts: `ht` sends once per node, `ll` once per expert; `dedup` says where copies merge.

    `spare_slots` of each GPU and layer stay empty: room for later replicas and for what a migration receives first.
    """

    size: Count | None = None
    order: Literal["node-major"] = "node-major"
    slots_per_gpu: Count | None = None
    spare_slots: Annotated[int, Field(ge=0)] = 0
    mode: Literal["ht", "ll"] = "ht"
    dedup: Literal["node", "gpu", "none"] = "node"
    dispatch: Literal["nearest", "uniform", "quota"] = "uniform"
    tokens_per_gpu: Count = 4096
    batch_tokens: Count = 4096


class ClusterSpec(Strict):
    """A whole cluster file."""

    version: Literal[1] = 1
    model: ModelSpec = ModelSpec()
    gpu_types: dict[str, GpuType] = Field(default_factory=lambda: {"default": GpuType()})
    node_types: dict[str, NodeType]
    nodes: Annotated[list[NodeGroup], Field(min_length=1)]
    links: Links = Links()
    ep: ExpertParallel = ExpertParallel()
    tiers: Tiers = Tiers()
    guessed: list[str] = Field(default_factory=list)  # notes of `place cluster`; nobody computes with them

    @model_validator(mode="after")
    def _names_resolve(self) -> Self:
        for group in self.nodes:
            if group.type not in self.node_types:
                raise ValueError(f"nodes: unknown node type {group.type!r}; node_types has {sorted(self.node_types)}")
            wanted = self.node_types[group.type].gpus
            if wanted.type is not None and wanted.type not in self.gpu_types:
                raise ValueError(
                    f"node type {group.type!r}: unknown GPU type {wanted.type!r}; there are {sorted(self.gpu_types)}"
                )
            if wanted.type is None and len(self.gpu_types) > 1:
                raise ValueError(
                    f"node type {group.type!r}: say which GPU type; gpu_types has {sorted(self.gpu_types)}"
                )
            for override in group.gpus.values():
                if override.type is not None and override.type not in self.gpu_types:
                    raise ValueError(f"nodes: unknown GPU type {override.type!r}; there are {sorted(self.gpu_types)}")
            if outside := [index for index in group.gpus if not 0 <= index < wanted.count]:
                raise ValueError(f"nodes: GPU index {outside[0]} is outside 0..{wanted.count - 1} of {group.type!r}")
        return self
