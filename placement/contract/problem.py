"""Problem: what is to be placed, on what, judged by which traffic.

Shapes: W scenarios, L MoE layers, E experts, T tokens, K experts per token, G GPUs, P slots of a layer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from routing.traces import RoutingTrace, load_LE

from .cluster import Cluster
from .feasibility import explain_memory, explain_slots
from .layer_numbers import LayerNumbers, layers_of_loads, layers_of_trace

if TYPE_CHECKING:
    from .plan import Plan

Float = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Scenario:
    """One workload: loads always, the tokens themselves where a trace was recorded.

    Args:
        name: what it is called in reports.
        load_LE: routed tokens per layer and expert, float64.
        trace: the routing trace that the loads come from, or None; fan-out and hops need it.
    """

    name: str
    load_LE: Float
    trace: RoutingTrace | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """Experts to place, machines to place them on, and the workloads that judge a plan.

    Args:
        cluster: the machines, with their memory, speeds and links.
        scenarios: at least one workload; all have the same layers and experts.
        slots_per_gpu: expert slots of each GPU and layer; G * slots_per_gpu = P >= E.
        layer_ids: the decoder layer (dense ones counted) of each MoE layer.
        hidden_layers: decoder layers in all.
        groups: expert groups of the router (DeepSeek), 1 if there are none.
        current: the plan that runs now, for objectives with churn.
        experts_per_layer: real experts of each layer where layers differ; ids from there up to E have no load.

    Raises:
        ValueError: if shapes disagree, the slots do not fit the experts, or the memory does not fit the slots.
    """

    cluster: Cluster
    scenarios: tuple[Scenario, ...]
    slots_per_gpu: int
    layer_ids: tuple[int, ...]
    hidden_layers: int
    groups: int = 1
    current: "Plan | None" = None
    experts_per_layer: tuple[int, ...] | None = None
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.scenarios:
            raise ValueError("a problem needs at least one scenario; got none")
        shapes = {scenario.load_LE.shape for scenario in self.scenarios}
        if len(shapes) > 1 or len(next(iter(shapes))) != 2:
            raise ValueError(f"all scenarios need the same [layers, experts] loads; got {sorted(shapes)}")
        for scenario in self.scenarios:
            if not np.all(np.isfinite(scenario.load_LE)) or np.any(scenario.load_LE < 0):
                raise ValueError(f"loads of {scenario.name} must be finite and not negative")
        if len(self.layer_ids) != self.num_layers:
            raise ValueError(f"layer_ids must name {self.num_layers} layers; got {len(self.layer_ids)}")
        if self.experts_per_layer is not None:
            self._check_experts_per_layer(self.experts_per_layer)
        if self.num_experts % self.groups:
            raise ValueError(f"{self.num_experts} experts do not split into {self.groups} groups")
        explain_slots(self.num_experts, self.num_slots, self.num_gpus, from_slots_per_gpu=True)
        if not self.cluster.has_lower_tiers:
            explain_memory(self.cluster, self.num_layers, self.slots_per_gpu, self.num_experts)

    def _check_experts_per_layer(self, counts: tuple[int, ...]) -> None:
        if len(counts) != self.num_layers or max(counts) > self.num_experts or min(counts) < 1:
            raise ValueError(
                f"experts_per_layer must give {self.num_layers} layers 1 to {self.num_experts} experts each; "
                f"got {list(counts)[:16]}"
            )
        for scenario in self.scenarios:
            for layer, count in enumerate(counts):
                if scenario.load_LE[layer, count:].any():
                    raise ValueError(f"{scenario.name}: layer {layer} has load on experts beyond its {count}")

    @property
    def num_layers(self) -> int:
        """L: MoE layers."""
        return self.scenarios[0].load_LE.shape[0]

    @property
    def num_experts(self) -> int:
        """E: experts of each layer."""
        return self.scenarios[0].load_LE.shape[1]

    @property
    def experts_L(self) -> NDArray[np.int64]:
        """Experts of each layer: E, unless `experts_per_layer` says that layers differ."""
        counts = self.experts_per_layer
        return np.full(self.num_layers, self.num_experts) if counts is None else np.array(counts, np.int64)

    @property
    def num_gpus(self) -> int:
        """G, over all nodes."""
        return self.cluster.num_gpus

    @property
    def num_slots(self) -> int:
        """P: slots of a layer over all GPUs, replicas included."""
        return self.cluster.num_gpus * self.slots_per_gpu

    @property
    def top_k(self) -> int:
        """Experts per token: from the trace, else from the cluster file, else 1."""
        trace = self.scenarios[0].trace
        return trace.top_k if trace is not None else self.cluster.model.top_k or 1

    @property
    def batch_routes(self) -> int:
        """Routed rows of one batch over all GPUs: tokens_per_gpu * G * K."""
        return self.cluster.ep.tokens_per_gpu * self.num_gpus * self.top_k

    @property
    def has_tokens(self) -> bool:
        """Whether every scenario has its tokens, so that fan-out and hops can be told."""
        return all(scenario.trace is not None for scenario in self.scenarios)

    @property
    def fits_gpus(self) -> bool:
        """Whether every GPU holds its slots and spare ones; true if sizes are unknown, or there are no lower tiers.

        False where GPUs only lend memory: an expert there is not where it is computed.
        """
        size = self.cluster.model.bytes_per_expert
        if self.cluster.tiers.peers is not None:
            return False
        if size is None or not self.cluster.has_lower_tiers:
            return True
        slots = self.slots_per_gpu + self.cluster.ep.spare_slots
        return slots * self.num_layers * size <= float(np.min(self.cluster.memory_bytes_G))

    @property
    def load_WLE(self) -> Float:
        """Routed tokens of each scenario, layer and expert."""
        return np.stack([scenario.load_LE for scenario in self.scenarios])

    @property
    def weight_WLE(self) -> Float:
        """Loads scaled so that each layer of each scenario sums to 1 (a layer without any load stays 0)."""
        load_WLE = self.load_WLE
        total_WL1 = load_WLE.sum(axis=2, keepdims=True)
        return np.divide(load_WLE, total_WL1, out=np.zeros_like(load_WLE), where=total_WL1 > 0)

    def restrict(self, layers: NDArray[np.integer[Any]]) -> Self:
        """The same problem for some of its layers, without the plan that runs now."""
        chosen = tuple(
            Scenario(name=s.name, load_LE=s.load_LE[layers], trace=_trace_layers(s.trace, layers))
            for s in self.scenarios
        )
        counts = self.experts_per_layer
        return replace(
            self,
            scenarios=chosen,
            layer_ids=tuple(self.layer_ids[i] for i in layers),
            current=None,
            experts_per_layer=None if counts is None else tuple(counts[i] for i in layers),
        )

    def with_trace(self, trace: RoutingTrace) -> Self:
        """The same problem judged by another trace of the same layers and experts."""
        scenario = Scenario(name=self.scenarios[0].name, load_LE=load_LE(trace).astype(np.float64), trace=trace)
        return replace(self, scenarios=(scenario,))

    @classmethod
    def from_trace(
        cls, trace: RoutingTrace | Mapping[str, RoutingTrace], cluster: Cluster, *, replicas: int | None = None
    ) -> Self:
        """The problem that a routing trace poses, or several traces by name (one scenario each).

        Args:
            trace: experts of every token; several by name must have the same layers and experts.
            cluster: the machines; `model` is checked against the trace.
            replicas: slots per layer beyond one per expert; None takes `ep.slots_per_gpu`, or else 0.
        """
        traces = {"trace": trace} if isinstance(trace, RoutingTrace) else dict(trace)
        scenarios = tuple(
            Scenario(name=name, load_LE=load_LE(one).astype(np.float64), trace=one) for name, one in traces.items()
        )
        L = scenarios[0].load_LE.shape[0] if scenarios else 0
        if len(found := {(one.layer_ids, one.metadata.get("hidden_layers")) for one in traces.values()}) > 1:
            raise ValueError(f"the traces are of different layers: {sorted(map(str, found))}")
        recorded, hidden = found.pop() if found else (None, None)
        numbers = layers_of_trace(L, recorded, hidden, cluster.model)
        return cls._build(cluster, scenarios, replicas, numbers)

    @classmethod
    def from_loads(
        cls,
        loads: Mapping[str, NDArray[Any]] | NDArray[Any],
        cluster: Cluster,
        *,
        replicas: int | None = None,
        layer_ids: Sequence[int] | None = None,
        experts_per_row: Sequence[int] | None = None,
    ) -> Self:
        """The problem that expert loads pose.

        Rows that are all zero in every scenario are dense layers, unless `layer_ids` or the cluster file's `moe_layers`
        say that they are MoE layers, which were idle.

        Args:
            loads: [hidden layers, E] counts, or several by name (one scenario each).
            cluster: the machines; `model` is checked against the loads.
            replicas: slots per layer beyond one per expert; None takes `ep.slots_per_gpu`, or else 0.
            layer_ids: decoder layers of all rows, or of the MoE layers among rows that are decoder layers.
            experts_per_row: real experts of each row where rows differ; the others have no load.
        """
        named = dict(loads) if isinstance(loads, Mapping) else {"loads": loads}
        arrays = {name: np.asarray(load, np.float64) for name, load in named.items()}
        if not arrays or len({load.shape for load in arrays.values()}) > 1:
            raise ValueError(f"loads need the same [layers, experts]; got {[load.shape for load in arrays.values()]}")
        used = np.any([load.sum(axis=1) != 0 for load in arrays.values()], axis=0)
        if not used.any():
            raise ValueError("every layer of the loads is all zero; there is nothing to place")
        numbers = layers_of_loads(used, layer_ids, cluster.model)
        scenarios = tuple(Scenario(name=name, load_LE=load[list(numbers.rows)]) for name, load in arrays.items())
        if experts_per_row is not None:
            counts = [int(experts_per_row[row]) for row in numbers.rows]
            model = cluster.model.model_copy(update={"experts_per_layer": counts if len(set(counts)) > 1 else None})
            cluster = replace(cluster, model=model)
        return cls._build(cluster, scenarios, replicas, numbers)

    @classmethod
    def _build(
        cls,
        cluster: Cluster,
        scenarios: tuple[Scenario, ...],
        replicas: int | None,
        numbers: LayerNumbers,
    ) -> Self:
        if not scenarios:
            raise ValueError("a problem needs at least one scenario; got none")
        E = scenarios[0].load_LE.shape[1]
        model = cluster.model
        for wanted, got, what in (
            (model.experts, E, "experts"),
            (model.moe_layers, len(numbers.layer_ids), "moe_layers"),
        ):
            if wanted is not None and wanted != got:
                raise ValueError(f"the cluster says model.{what} = {wanted}, the routing data has {got}")
        if replicas is not None and replicas < 0:
            raise ValueError(f"replicas must be 0 or more extra slots per layer; got {replicas}")
        if replicas is None and cluster.ep.slots_per_gpu is not None:
            slots = cluster.ep.slots_per_gpu * cluster.num_gpus
            explain_slots(E, slots, cluster.num_gpus, from_slots_per_gpu=True)
        else:
            slots = E + (replicas or 0)
            explain_slots(E, slots, cluster.num_gpus, from_slots_per_gpu=False)
        return cls(
            cluster=cluster,
            scenarios=scenarios,
            slots_per_gpu=slots // cluster.num_gpus,
            layer_ids=numbers.layer_ids,
            hidden_layers=numbers.hidden_layers,
            groups=model.expert_groups,
            experts_per_layer=None if model.experts_per_layer is None else tuple(model.experts_per_layer),
        )


def _trace_layers(trace: RoutingTrace | None, layers: NDArray[np.integer[Any]]) -> RoutingTrace | None:
    if trace is None:
        return None
    return RoutingTrace(
        expert_TLK=trace.expert_TLK[:, layers],
        sequence_T=trace.sequence_T,
        metadata={"num_experts": trace.num_experts},
    )
