"""What a cluster file may say: pydantic models, unknown keys refused, quantities in SI units once read."""

import re
from typing import Annotated, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from routing.ground.quantity import parse_bytes, parse_bytes_per_s, parse_flops, parse_seconds

LEAST_BARE = 1e6  # no device holds less than 1 MB or moves less than 1 MB/s; 80 or 450 are meant as GiB and GB/s
DTYPE_BYTES = {"fp4": 0.5, "fp8": 1.0, "int8": 1.0, "bf16": 2.0, "fp16": 2.0, "fp32": 4.0}
_BARE = re.compile(r"\s*[0-9.]+(?:[eE][+-]?[0-9]+)?\s*")
_LETTER_ONLY = re.compile(r"\s*[0-9.]+(?:[eE][+-]?[0-9]+)?\s*([kKMGTP]i?)(?:/s|ps)?\s*")


def _device_bytes(value: object) -> float:
    """Memory of a device: a size with its unit, or whole bytes."""
    size = parse_bytes(value)
    if 0 < size < LEAST_BARE and _is_bare(value):
        raise ValueError(f"{value} would be {size:g} bytes; write the unit, for instance {value}GiB")
    return size


def _rate(value: object) -> float:
    """A bandwidth with its unit, or whole bytes per second."""
    if isinstance(value, str) and (letter := _LETTER_ONLY.fullmatch(value)):
        number, prefix = value[: letter.start(1)].strip(), letter[1]
        raise ValueError(f"{value} is bytes or bits? write {number}{prefix}B/s or {number}{prefix}b/s (8 times less)")
    rate = parse_bytes_per_s(value)
    if 0 < rate < LEAST_BARE and _is_bare(value):
        raise ValueError(f"{value} would be {rate:g} bytes per second; write the unit, for instance {value}GB/s")
    return rate


def _is_bare(value: object) -> bool:
    return not isinstance(value, str) or _BARE.fullmatch(value) is not None


Bytes = Annotated[float, BeforeValidator(parse_bytes), Field(ge=0, allow_inf_nan=False)]
DeviceBytes = Annotated[float, BeforeValidator(_device_bytes), Field(ge=0, allow_inf_nan=False)]
BytesPerSecond = Annotated[float, BeforeValidator(_rate), Field(gt=0, allow_inf_nan=False)]
Seconds = Annotated[float, BeforeValidator(parse_seconds), Field(ge=0, allow_inf_nan=False)]
Flops = Annotated[float, BeforeValidator(parse_flops), Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Strict(BaseModel):
    """Base of all sections: unknown keys are errors, instances do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSpec(Strict):
    """The model whose experts are placed; everything is optional, but latency and memory need sizes."""

    name: str = ""
    moe_layers: Count | None = None
    first_moe_layer: Annotated[int, Field(ge=0)] = 0
    hidden_layers: Count | None = None
    experts: Count | None = None
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
    """One kind of GPU."""

    memory: DeviceBytes | None = None
    hbm: BytesPerSecond = 3.35e12
    flops: dict[str, Flops] = Field(default_factory=lambda: {"bf16": 989e12})
    efficiency: Share = 0.6


class GpusOfNode(Strict):
    """Which GPUs sit in a node."""

    type: str | None = None
    count: Count


class Nic(Strict):
    """Network cards of one node, one per GPU by default; bandwidth is one card's, one direction."""

    count: Count | None = None
    bandwidth: BytesPerSecond = 50e9


class Store(Strict):
    """A memory tier of one node."""

    size: DeviceBytes
    bandwidth: BytesPerSecond


class NodeType(Strict):
    """One kind of node."""

    gpus: GpusOfNode
    nvlink: BytesPerSecond = 450e9
    nic: Nic = Nic()
    pcie: BytesPerSecond = 64e9
    dram: Store | None = None
    ssd: Store | None = None


class GpuOverride(Strict):
    """What differs for one GPU of a node: relative speed, memory kept for other uses."""

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
    """How the engine runs experts: `ht` sends once per node, `ll` once per expert; `dedup` says where copies merge."""

    size: Count | None = None
    order: Literal["node-major"] = "node-major"
    slots_per_gpu: Count | None = None
    mode: Literal["ht", "ll"] = "ht"
    dedup: Literal["node", "gpu", "none"] = "node"
    dispatch: Literal["nearest", "uniform", "quota"] = "uniform"
    tokens_per_gpu: Count = 4096


class CpuTier(Strict):
    """Experts in host memory, computed there if `compute`."""

    compute: bool = True


class SsdTier(Strict):
    """Experts on the node's SSD."""


class Tiers(Strict):
    """Which tiers may hold experts."""

    gpu: Literal["required", "optional"] = "required"
    cpu: CpuTier | None = None
    ssd: SsdTier | None = None


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
            if outside := [index for index in group.gpus if not 0 <= index < wanted.count]:
                raise ValueError(f"nodes: GPU index {outside[0]} is outside 0..{wanted.count - 1} of {group.type!r}")
        return self
