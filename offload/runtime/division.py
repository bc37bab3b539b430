"""How memory is divided: what `load` does and `fit` foretells, by the same arithmetic."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from routing.ground.quantity import format_size, parse_size

from ..cache.starting import StartingPlan, TracedSlots, read_starting_plan
from ..checkpoint.experts import experts_modules
from ..compute.levels import multiplied_shapes
from ..compute.resident import expected_saving, moved_twice_bytes
from ..formats.resident.linears import IsMultiplied
from ..gpu.lanes import Lane
from ..gpu.plan.budget import plan_gpu, split_needs
from ..gpu.plan.planning import gpu_limit, gpu_slot_bytes, hold_to
from ..memory.budget import (
    AUTO_SHARE,
    Budgets,
    MemoryPlan,
    Needs,
    available_memory,
    bytes_for_experts,
    expect_budgets,
    machine_bytes,
    plan_memory,
    room_besides,
    spread_slots,
    sufficient_size,
)
from ..window.planning import WindowPlan, plan_tables, plan_window, smallest_window
from .needs import memory_needs
from .opening import OpenedCheckpoint
from .options import LoadOptions


@dataclass(frozen=True, kw_only=True)
class Division:
    """Who gets which memory.

    Args:
        ram: the budget of the process.
        gpu: the budget on the GPU; None without one.
        starting: the experts that are in slots from the start; None leaves them empty.
        peer_slots: slots of each layer in another GPU's memory; empty for none.
    """

    ram: MemoryPlan
    gpu: MemoryPlan | None
    starting: StartingPlan | TracedSlots | None
    peer_slots: tuple[int, ...] = ()


def divide_memory(
    opened: OpenedCheckpoint,
    options: LoadOptions,
    lane: Lane | None,
    host_bytes: Callable[[], int] | None = None,
) -> Division:
    """Divide the budgets of a model.

    Args:
        opened: the checkpoint, whose sizes are divided by.
        options: the budgets for RAM and GPU, a plan or slots.
        lane: the GPU that is there, or None; `options.gpu_memory` plans for one that is elsewhere.
        host_bytes: called once the GPU's plan stands: moves the model there and says what the process then has.

    Raises:
        ValueError: if a budget is too small; the message says which would do.
    """
    needs, gpu = needs_of(opened, options), None
    has_gpu = lane is not None or options.gpu_memory != "auto"
    starting = _starting(opened, options, has_gpu)
    if has_gpu:
        needs, gpu = _divide_gpu(opened, options, lane, needs, starting)
    if host_bytes is not None:
        # what the GPU's libraries take on the host is only known when they are loaded
        needs = replace(needs, process_bytes=host_bytes())
    limit = cpu_limit(options)
    most_L = opened.most_slots_L
    fixed = None if options.cache_experts is None else [min(options.cache_experts, most) for most in most_L]
    loading = _loading_bytes(opened, needs) if gpu is None else 0
    ram = _plan_ram(opened, needs, limit, fixed, loading)
    _expect_room_to_load(needs, limit, loading)
    if starting is not None:
        slots = starting.slots(opened.slot_bytes_L, _least(opened), limit - ram.fixed_bytes)
        ram = _plan_ram(opened, needs, limit, slots, loading)
    return Division(ram=ram, gpu=gpu, starting=starting, peer_slots=_peer_slots(opened, options, starting))


def _peer_slots(
    opened: OpenedCheckpoint, options: LoadOptions, starting: StartingPlan | TracedSlots | None
) -> tuple[int, ...]:
    """Slots in another GPU's memory: those of a plan, and as many as are given, alike; the rest of it is not ours."""
    planned = [len(experts) for experts in starting.peer_L] if starting is not None else []
    if options.peer_memory is None:
        return tuple(planned)
    sizes = [form.layer.plain_bytes for form in opened.forms]
    limit, planned = parse_size(options.peer_memory), planned or [0] * len(sizes)
    if (wanted := sum(count * size for count, size in zip(planned, sizes, strict=True))) > limit:
        raise ValueError(
            f"the plan keeps {format_size(wanted)} of experts in peer memory, and peer_memory={options.peer_memory}; "
            "give more, or leave it out"
        )
    slots = spread_slots(limit, sizes, opened.experts_L, planned)
    if not any(slots):
        raise ValueError(
            f"peer_memory={options.peer_memory} holds no expert, the smallest of which takes {format_size(min(sizes))}"
        )
    return tuple(slots)


def _starting(opened: OpenedCheckpoint, options: LoadOptions, has_gpu: bool) -> StartingPlan | TracedSlots | None:
    if options.plan is None:
        return None
    starting = read_starting_plan(options.plan, opened.experts_L, node=options.node, has_gpu=has_gpu)
    if any(starting.gpu_L) and options.gpu_experts is not None:
        raise ValueError("plan and gpu_experts both say how many GPU slots a layer has; give one of them")
    return starting


def _least(opened: OpenedCheckpoint) -> list[int]:
    """Slots that one token needs in each layer."""
    return [min(opened.top_k, count) for count in opened.experts_L]


def _plan_ram(
    opened: OpenedCheckpoint, needs: Needs, limit_bytes: int, slots: list[int] | None, loading_bytes: int
) -> MemoryPlan:
    try:
        return plan_memory(
            *(limit_bytes, needs, opened.slot_bytes_L, opened.most_slots_L, opened.top_k, slots, loading_bytes),
            whole_bytes=opened.whole_bytes,
        )
    except ValueError as error:
        raise ValueError(f"{error}; {_held(needs)}") from error


def _held(needs: Needs) -> str:
    """What the process has without this model: much more than libraries take means that another model is loaded."""
    return f"the process holds {format_size(needs.process_bytes)} before this model (libraries, other models)"


def budgets_of(opened: OpenedCheckpoint, options: LoadOptions) -> Budgets:
    """The least budget that `load` accepts without a GPU, and the one that holds all experts."""
    shapes = opened.slot_bytes_L, opened.most_slots_L, opened.top_k
    whole = needs_of(replace(opened, window=None, unit_slots=()), options)
    budgets = expect_budgets(whole, *shapes, _loading_bytes(opened, whole), whole_bytes=opened.whole_bytes)
    if opened.bundle is not None:
        everything = replace(opened, unit_slots=tuple(layer.num_units for layer in opened.bundle.layers))
        most = expect_budgets(needs_of(everything, options), *shapes, _loading_bytes(everything, whole))
        return Budgets(least_bytes=budgets.least_bytes, all_bytes=most.least_bytes)
    if not opened.guests.nbytes:
        return budgets
    smallest = smallest_window(opened.guests, options.resident_layers, options.layers_ahead)
    streaming = replace(opened, window=smallest)
    needs = needs_of(streaming, options)
    least = expect_budgets(needs, *shapes, _loading_bytes(streaming, needs), whole_bytes=opened.whole_bytes)
    return Budgets(least_bytes=least.least_bytes, all_bytes=budgets.all_bytes)


def choose_units(opened: OpenedCheckpoint, options: LoadOptions) -> OpenedCheckpoint:
    """The same checkpoint, with as many of its units in memory as a budget holds, of each layer the same share.

    Args:
        opened: with or without a bundle.
        options: the budget, or how many units stay.
    """
    if opened.bundle is None:
        if options.cache_units is not None:
            raise ValueError("cache_units is about the units of a bundle; give pack= a file of `pack --bundle`")
        return opened
    if options.cache_units is not None:
        slots = (min(options.cache_units, layer.num_units) for layer in opened.bundle.layers)
        return replace(opened, unit_slots=tuple(slots))
    room = room_besides(cpu_limit(options), memory_needs(opened, options), (), (), 0)
    return with_unit_room(opened, room)


def with_unit_room(opened: OpenedCheckpoint, room: int) -> OpenedCheckpoint:
    """The same checkpoint, with as many of its units in memory as so many bytes hold, of each layer the same share."""
    assert opened.bundle is not None
    share = min(max(room, 0) / opened.bundle.nbytes, 1.0)
    return replace(opened, unit_slots=tuple(int(share * layer.num_units) for layer in opened.bundle.layers))


def choose_window(opened: OpenedCheckpoint, options: LoadOptions) -> WindowPlan | None:
    """What of a model has to be streamed, because a budget does not hold it beside the experts of one token.

    Args:
        opened: of which nothing is loaded.
        options: the budget, and how many layers shall stay or be read ahead.
    """
    if options.wants_gpu or opened.bundle is not None:
        return None
    limit, shapes = cpu_limit(options), (opened.slot_bytes_L, opened.most_slots_L, opened.top_k)
    if options.resident_layers is None and (room := room_besides(limit, needs_of(opened, options), *shapes)) >= 0:
        one_token = sum(min(opened.top_k, count) * size for size, count in zip(*shapes[:2], strict=True))
        return plan_tables(opened.guests) if room < opened.whole_bytes - one_token else None
    # streamed weights are plain, whatever the form of those in memory, and what stays may be no smaller
    needs = memory_needs(opened, options)
    besides = replace(needs, weight_bytes=needs.weight_bytes - opened.guests.nbytes)
    room = room_besides(limit, besides, *shapes)
    return plan_window(opened.guests, room, options.resident_layers, options.layers_ahead)


def stored_shapes(options: LoadOptions) -> IsMultiplied:
    """Which shapes of linear layers stay in memory as the checkpoint stores them; none where a GPU computes them."""
    return (lambda shape: False) if options.wants_gpu else multiplied_shapes(options.arithmetic)


def _loading_bytes(opened: OpenedCheckpoint, needs: Needs) -> int:
    """What loading takes: the largest resident weight exists twice for a moment."""
    return needs.process_bytes + needs.weight_bytes + moved_twice_bytes(opened.model, opened.streamed)


def _expect_room_to_load(needs: Needs, limit_bytes: int, loading_bytes: int) -> None:
    """Refuse a budget that loading alone exceeds, though what comes after it would fit."""
    if loading_bytes > limit_bytes:
        raise ValueError(
            f"{format_size(limit_bytes)} is too small to load the weights that stay resident; "
            f"give at least {sufficient_size(loading_bytes)}; {_held(needs)}"
        )


def expect_machine_has(options: LoadOptions) -> None:
    """Refuse a budget that the kernel would never grant; `fit` may plan for larger machines.

    Raises:
        ValueError: if `cpu_memory` is more than this machine or its control group has.
    """
    if options.cpu_memory != "auto" and cpu_limit(options) > machine_bytes():
        raise ValueError(
            f"cpu_memory={options.cpu_memory} is more than the {format_size(machine_bytes())} that this machine or "
            'control group has; give less, or "auto"'
        )


def needs_of(opened: OpenedCheckpoint, options: LoadOptions) -> Needs:
    """What the process needs besides expert slots, without a GPU."""
    needs = memory_needs(opened, options)
    is_skeleton = any(parameter.is_meta for parameter in opened.model.parameters())
    if is_skeleton and opened.linears is not None:
        saving = expected_saving(opened.model, opened.linears, opened.streamed)
        needs = replace(needs, weight_bytes=needs.weight_bytes - saving)
    return needs


def cpu_limit(options: LoadOptions) -> int:
    """The budget of the process in bytes."""
    if options.cpu_memory == "auto":
        return int(AUTO_SHARE * available_memory())
    return parse_size(options.cpu_memory)


def _divide_gpu(
    opened: OpenedCheckpoint,
    options: LoadOptions,
    lane: Lane | None,
    needs: Needs,
    starting: StartingPlan | TracedSlots | None,
) -> tuple[Needs, MemoryPlan]:
    """What is left for the CPU to hold, and the GPU's budget."""
    if lane is not None:
        _expect_gpu_layers(opened)
    slot_bytes_L, ring_bytes = gpu_slot_bytes(opened.model, opened.forms)
    on_cpu, on_gpu = split_needs(needs, ring_bytes)
    counts = opened.experts_L
    fixed = None if options.gpu_experts is None else [min(options.gpu_experts, count) for count in counts]
    limit = gpu_limit(options.gpu_memory, lane)
    if starting is not None:
        held = starting.gpu_slots(slot_bytes_L, _least(opened), bytes_for_experts(limit, on_gpu))
        fixed = fixed if held is None else held
    plan = plan_gpu(limit, on_gpu, slot_bytes_L, counts, opened.top_k, fixed)
    if lane is not None:
        hold_to(lane, limit, is_given=options.gpu_memory != "auto" and options.gpu_experts is None)
    return on_cpu, plan


def _expect_gpu_layers(opened: OpenedCheckpoint) -> None:
    """Refuse experts modules that compute themselves by a loop of their own: only the CPU runs those."""
    for name, module in experts_modules(opened.model).items():
        if getattr(module, "is_own_loop", False):
            raise ValueError(f'{type(module).__name__} ({name}) is computed on the CPU only; use device="cpu"')
