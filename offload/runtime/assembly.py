"""The parts of an offloaded model put together, once it is known who gets which memory."""

from collections.abc import Callable
from types import MethodType
from typing import Any

from routing.ground.model_config import text_config

from ..cache.catalogue import NEEDS_PREDICTOR
from ..checkpoint.experts import experts_modules
from ..compute.attention import quicken_attention
from ..compute.layers.routed_block import PLACE
from ..compute.layers.trial import quicken_layers
from ..compute.levels import best_arithmetic
from ..compute.linears import quicken_linears
from ..compute.matvec import Matvecs
from ..compute.norms import quicken_norms
from ..formats.lossy.levelled import LevelledForm
from ..gpu.lanes import Lane
from ..gpu.tier import GpuTier
from ..memory.budget import MemoryPlan
from ..neurons.binding import BundledUnits
from ..prefetch.find_routers import make_prefetcher
from ..prefetch.hashed_layers import find_tables, read_by_ids
from ..prefetch.pass_predictor import PassPrefetcher
from ..ram.depth_rules import make_rule
from ..ram.level_slots import LevelSlots
from ..ram.slots import LayerSlots
from ..store.io_mode import wants_direct
from ..store.store import ExpertStore
from ..window.binding import bind
from ..window.planning import WindowPlan
from ..window.window import Streamed, Window
from .depths import Deepening
from .division import Division
from .guarded.lent_guests import LentGuests
from .guards import guard_model
from .opening import OpenedCheckpoint
from .options import LoadOptions
from .pieces import read_prompts_in_pieces
from .recorder import TraceRecorder
from .report import Offload
from .runtime import IMPLEMENTATION, OffloadRuntime, offloaded_experts_forward


def assemble(
    opened: OpenedCheckpoint,
    division: Division,
    options: LoadOptions,
    lane: Lane | None,
    make_window: Callable[[ExpertStore, WindowPlan, int], Streamed] = Window,
    deepening: Deepening | None = None,
) -> Any:
    """The model with its tiers, ready to run.

    Args:
        opened: the model and its experts' places.
        division: slots per layer and tier.
        options: how to read, compute and record.
        lane: the GPU, or None.
        make_window: where streamed weights live.
        deepening: the rule that chooses depths while the model runs; None if there is none.
    """
    model, forms, window = opened.model, opened.forms, opened.window
    passing = [guest.form for guest in window.streamed] if window else []
    tables = [guest.form for guest in window.tables] if window else []
    matvecs = Matvecs(_arithmetic(opened, options, lane))
    store = ExpertStore(
        model,
        [*forms, *passing, *tables],
        num_threads=options.io_threads,
        is_direct=wants_direct(options.io, division.ram, [*forms, *passing]),
        checksums=opened.checksums,
        level_checksums=None if deepening is None else deepening.packed.level_checksums,
    )
    recorder = _recorder(opened, options) if options.record_trace else None
    plan, layers = _make_layers(store, division.ram, options.policy_name, deepening)
    running = OffloadRuntime(store, layers, recorder, matvecs)
    if opened.own_L is not None:
        for slots, own in zip(running.layers, opened.own_L, strict=True):
            slots.own = own
    if forms:
        running.prefetcher = make_prefetcher(str(options.prefetch), model, [form.layer for form in forms], opened.top_k)
    if options.policy_name in NEEDS_PREDICTOR and not isinstance(running.prefetcher, PassPrefetcher):
        raise ValueError(
            f"policy {options.policy_name} keeps what a predictor of whole passes expects; give prefetch= a file of "
            "`expertier trace predictor --before-pass`"
        )
    if forms:
        _attach(model, running)
    if lane is None:
        quicken_linears(model, matvecs)
        quicken_norms(model)
        quicken_attention(model)
        running.quickened = quicken_layers(model, matvecs)
    else:
        _add_gpu_tier(opened, division, lane, running)
    if window is not None:
        running.window = make_window(store, window, len(forms))
        running.guests = LentGuests(running.window, running.changes)
        bind(model, window, running.guests)
    if opened.bundle is not None:
        running.units = BundledUnits(opened.bundle, list(opened.unit_slots), options.io_threads)
        running.units.bind(model)
    if division.starting is not None:
        if running.gpu is not None:
            running.gpu.hold(division.starting.gpu_L)
            running.gpu.hold_at_peers(division.starting.peer_L)
        running.ahead.fill(division.starting.experts_L)
    if running.prefetcher is not None:
        running.prefetcher.attach(model, running.ahead)
    if str(options.prefetch) != "off":
        read_by_ids(model, find_tables(model, [form.layer for form in forms]), running.ahead)
    read_prompts_in_pieces(model, options.context)
    if forms or opened.streamed:
        guard_model(model)
    model.offload = Offload(model, running, plan, options.policy_name, deepening)
    return model


def _make_layers(
    store: ExpertStore, plan: MemoryPlan, policy: str, deepening: Deepening | None
) -> tuple[MemoryPlan, list[LayerSlots]]:
    """The slots of each layer, and the budget as they divide it."""
    if deepening is None:
        return plan, [LayerSlots(store, layer, count, policy) for layer, count in enumerate(plan.num_slots)]
    plan, rooms = deepening.rooms(plan)
    layers: list[LayerSlots] = []
    for layer, room in enumerate(rooms):
        if isinstance(form := store.forms[layer], LevelledForm):
            rule = make_rule(deepening.choice, len(form.level_ends), deepening.gates.get(layer))
            layers.append(LevelSlots(store, layer, room, policy, rule))
        else:
            layers.append(LayerSlots(store, layer, room.num_slots, policy))
    return plan, layers


def _arithmetic(opened: OpenedCheckpoint, options: LoadOptions, lane: Lane | None) -> str:
    """The level of exactness that was asked for; with a GPU, where ours are the kernels, `auto` is exact on the CPU."""
    if options.arithmetic != "auto":
        return options.arithmetic
    return "exact" if lane is not None else best_arithmetic(opened.model, [form.layer for form in opened.forms])


def _recorder(opened: OpenedCheckpoint, options: LoadOptions) -> TraceRecorder:
    metadata = {"model": str(options.path_or_id), "source": "expertier", **_decoder_layers(opened)}
    return TraceRecorder(len(opened.forms), max(opened.experts_L), metadata)


def _decoder_layers(opened: OpenedCheckpoint) -> dict[str, Any]:
    """Which decoder layers have experts, for the metadata of a trace; nothing where modules are not numbered so."""
    numbers = [[int(part) for part in form.layer.module_name.split(".") if part.isdigit()] for form in opened.forms]
    ids = [found[0] for found in numbers if len(found) == 1]
    hidden_layers = int(getattr(text_config(opened.config), "num_hidden_layers", 0) or 0)
    if len(ids) != len(opened.forms) or ids != sorted(set(ids)) or ids[-1] >= hidden_layers:
        return {}
    return {"layer_ids": ids, "hidden_layers": hidden_layers}


def _add_gpu_tier(opened: OpenedCheckpoint, division: Division, lane: Lane, running: OffloadRuntime) -> None:
    """Give a runtime its GPU slots; with `fast` arithmetic, whose last bits differ, the CPU computes some misses."""
    assert division.gpu is not None
    modules = list(experts_modules(opened.model).values())
    layers = [form.layer for form in opened.forms]
    share = running.matvecs if running.matvecs.arithmetic == "fast" else None
    running.changes.may_fork = False
    running.gpu = running.ahead.gpu = GpuTier(
        *(lane, layers, modules, running.layers, division.gpu, running.counters, share), division.peer_slots
    )


def _attach(model: Any, running: OffloadRuntime) -> None:
    """Tell each experts module where its layer's experts are."""
    for layer, module in enumerate(experts_modules(model).values()):
        setattr(module, PLACE, (running, layer))
        module.config._experts_implementation = IMPLEMENTATION
        # what transformers would look up by that name, at every call
        module.forward = MethodType(offloaded_experts_forward, module)
        if getattr(module, "is_own_loop", False):
            running.layers[layer].is_grouped = False
