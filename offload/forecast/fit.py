"""Will it fit? What a model needs in memory, from the headers of its checkpoint, without loading it."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from routing.ground.hardware import Hardware
from routing.traces import RoutingTrace

from ..cache.simulate import simulate
from ..checkpoint.location import heads_of
from ..compute.resident import embedding_bytes
from ..formats.form import Form
from ..gpu.plan.cost import GpuPrediction, predict_gpu_decode
from ..gpu.plan.planning import expect_forms_on_gpu
from ..memory.budget import Budgets, MemoryPlan, Needs, kv_bytes_per_token
from ..memory.cost import DecodeWork, Prediction, expected_hit_rate, predict_decode
from ..neurons.bundle import Bundle
from ..runtime.division import budgets_of, choose_units, choose_window, divide_memory, needs_of, stored_shapes
from ..runtime.opening import open_headers
from ..runtime.options import DEFAULT_POLICY, LoadOptions
from ..window.planning import WindowPlan


@dataclass(frozen=True, kw_only=True, eq=False)
class Fit:
    """What a model needs and what a budget buys.

    `budgets` are the least that `load` accepts and the one that holds all experts, both without a GPU.
    `plan` is None if the budget is too small; `shortfall` then says what would do. `gpu_plan` is None without a GPU.
    `unread_bytes` are weights of which a token reads a row: the embedding of its input. `window` is what is streamed
    of the weights outside experts; None if they all stay in memory. `kv_token_bytes` are the keys and values of one
    token in all layers, at most. `bundle` are units that come one by one, and `unit_slots` how many of each layer stay;
    such experts are in no form.
    """

    forms: list[Form]
    top_k: int
    needs: Needs
    budgets: Budgets
    unread_bytes: int
    plan: MemoryPlan | None
    shortfall: str | None
    gpu_plan: MemoryPlan | None = None
    window: WindowPlan | None = None
    kv_token_bytes: int = 0
    bundle: Bundle | None = None
    unit_slots: tuple[int, ...] = ()

    @property
    def dense_bytes(self) -> int:
        """Weights outside experts, in memory or streamed."""
        return self.needs.weight_bytes + (0 if self.window is None else self.window.saved_bytes)

    @property
    def streamed_bytes(self) -> int:
        """Of them, what every token reads from the disk."""
        return 0 if self.window is None else self.window.pass_bytes

    @property
    def expert_bytes(self) -> int:
        return sum(form.layer.num_experts * form.expert_bytes for form in self.forms)

    def predict(self, hardware: Hardware, *, is_fast: bool, hit_rate: float | None = None) -> Prediction:
        """Seconds per decoded token; without a hit rate, one that is typical for the share of experts in memory.

        Raises:
            ValueError: if the model does not fit.
        """
        if self.plan is None:
            raise ValueError(f"nothing to predict: {self.shortfall}")
        experts = sum(form.layer.num_experts for form in self.forms)
        if hit_rate is None and not self.forms:
            hit_rate = 1.0
        if hit_rate is None:
            share = sum(self.plan.num_slots) / experts
            hit_rate = expected_hit_rate(share, self.top_k, self.forms[0].layer.num_experts)
        work = DecodeWork(
            num_layers=len(self.forms),
            experts_per_layer=self.top_k,
            expert_bytes=self.expert_bytes // max(experts, 1),
            resident_bytes=self.dense_bytes - self.unread_bytes,
            hit_rate=hit_rate,
            streamed_bytes=self.streamed_bytes,
        )
        first = self.forms[0] if self.forms else None
        rate = hardware.token_rate(is_fast=is_fast) if first is None else first.token_rate(hardware, is_fast=is_fast)
        return predict_decode(work, hardware, rate=rate)

    def expect_shape(self, trace: RoutingTrace) -> None:
        """Raise ValueError if a trace has another number of MoE layers, or more experts, than the model."""
        counts = [form.layer.num_experts for form in self.forms]
        if trace.num_layers != len(counts) or trace.num_experts > max(counts, default=0):
            raise ValueError(
                f"the trace has {trace.num_layers} layers of {trace.num_experts} experts, "
                f"the model {len(counts)} of {max(counts, default=0)}"
            )

    def traced_hit_rate(self, trace: RoutingTrace) -> float:
        """The hit rate of the default policy on recorded routing, at the slots that the budget pays for.

        Args:
            trace: of this model, or of one with as many MoE layers and experts.

        Raises:
            ValueError: if the model does not fit, or the trace is of a model of another shape.
        """
        if self.plan is None:
            raise ValueError(f"nothing to predict: {self.shortfall}")
        self.expect_shape(trace)
        hits = accesses = 0
        for slots in sorted(set(self.plan.num_slots)):
            found = simulate(trace, slots, policies=(DEFAULT_POLICY,))[DEFAULT_POLICY]
            here = [layer for layer, count in enumerate(self.plan.num_slots) if count == slots]
            hits += int(found.hits_L[here].sum())
            accesses += int(found.accesses_L[here].sum())
        return hits / max(accesses, 1)

    def predict_gpu(self, hardware: Hardware) -> GpuPrediction:
        """Seconds per decoded token with the GPU tier, at hit rates that are typical for the shares of experts.

        Raises:
            ValueError: if the model does not fit, or the hardware has no GPU.
        """
        if self.plan is None or self.gpu_plan is None:
            raise ValueError(f"nothing to predict: {self.shortfall}")
        experts = sum(form.layer.num_experts for form in self.forms)
        on_gpu = sum(self.gpu_plan.num_slots)
        shares = (on_gpu / experts, (on_gpu + sum(self.plan.num_slots)) / experts)
        rates = [expected_hit_rate(min(share, 1), self.top_k, self.forms[0].layer.num_experts) for share in shares]
        work = DecodeWork(
            num_layers=len(self.forms),
            experts_per_layer=self.top_k,
            expert_bytes=self.expert_bytes // experts,
            resident_bytes=self.gpu_plan.weight_bytes,
            hit_rate=rates[1],
        )
        return predict_gpu_decode(work, rates[0], hardware)

    @property
    def active_bytes(self) -> int:
        """Bytes of the experts that one token uses."""
        return sum(min(self.top_k, form.layer.num_experts) * form.expert_bytes for form in self.forms)

    def as_json(self) -> dict[str, Any]:
        slots = list(self.plan.num_slots) if self.plan else None
        return {
            "fits": self.plan is not None,
            "reason": self.shortfall,
            "least_bytes": self.budgets.least_bytes,
            "all_bytes": self.budgets.all_bytes,
            "moe_layers": len(self.forms),
            "experts_per_layer": [form.layer.num_experts for form in self.forms],
            "experts_per_token": self.top_k,
            "expert_bytes": self.expert_bytes,
            "active_expert_bytes_per_token": self.active_bytes,
            "resident_weight_bytes": max(self.needs.weight_bytes, self.gpu_plan.weight_bytes if self.gpu_plan else 0),
            "kv_bytes": max(self.needs.kv_bytes, self.gpu_plan.kv_bytes if self.gpu_plan else 0),
            "streamed_bytes_per_token": self.streamed_bytes,
            "resident_layers": None if self.window is None else self.window.num_resident,
            "layers_ahead": None if self.window is None else self.window.ahead,
            "slots_per_layer": slots,
            "unit_slots_per_layer": list(self.unit_slots),
            "gpu_slots_per_layer": None if self.gpu_plan is None else list(self.gpu_plan.num_slots),
            "share_of_experts_in_memory": None
            if slots is None
            else sum(slots) / max(sum(form.layer.num_experts for form in self.forms), 1),
        }


def fit(
    path_or_id: str | Path,
    *,
    cpu_memory: str | int = "auto",
    gpu_memory: str | int | None = None,
    context: int = 2048,
    io_threads: int = 4,
    pack: str | Path | None = None,
    resident_layers: int | None = None,
    layers_ahead: int | None = None,
) -> Fit:
    """What `load` would do with these budgets and this packed copy; no GPU has to be there for `gpu_memory`.

    Args:
        path_or_id: a Hugging Face model folder, a GGUF file, or a model id, of which only heads are downloaded.
        cpu_memory: the whole budget of the process, or `"auto"`.
        gpu_memory: the whole budget on a GPU; None plans without one.
        context: tokens, prompt and answer together, to keep room for.
        io_threads: reads in flight at most, each with a buffer.
        pack: a packed copy of the experts, or a bundle of units.
        resident_layers, layers_ahead: as for `load`.

    Raises:
        ValueError: if the checkpoint is damaged, its experts cannot be offloaded, units are planned for a GPU, or a
            budget is not a size.
    """
    options = LoadOptions(
        path_or_id=path_or_id,
        cpu_memory=cpu_memory,
        gpu_memory="auto" if gpu_memory is None else gpu_memory,
        context=context,
        io_threads=io_threads,
        pack=pack,
        resident_layers=resident_layers,
        layers_ahead=layers_ahead,
    )
    with heads_of(path_or_id) as place:
        opened = open_headers(place, pack, stored_shapes(options))
    if opened.bundle is not None and gpu_memory is not None:
        raise ValueError(f"bundle {pack}: units are computed on the CPU; leave out the GPU's memory")
    opened = choose_units(replace(opened, window=choose_window(opened, options)), options)
    if gpu_memory is not None:
        expect_forms_on_gpu(opened.forms)
    division, shortfall = None, None
    try:
        division = divide_memory(opened, options, lane=None)
    except ValueError as error:
        shortfall = str(error)
    return Fit(
        forms=opened.forms,
        top_k=opened.top_k,
        needs=needs_of(opened, options),
        budgets=budgets_of(opened, options),
        unread_bytes=embedding_bytes(opened.model),
        plan=None if division is None else division.ram,
        shortfall=shortfall,
        gpu_plan=None if division is None else division.gpu,
        window=opened.window,
        kv_token_bytes=kv_bytes_per_token(opened.config, opened.model.dtype.itemsize),
        bundle=opened.bundle,
        unit_slots=opened.unit_slots,
    )
