"""Several models loaded into one budget: their weights share a pool, only the chosen one computes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial, wraps
from pathlib import Path
from typing import Any

from routing.ground.quantity import format_size

from ..compute.resident import move_to_huge_pages
from ..memory.budget import Needs, plan_memory, room_besides, sufficient_size
from ..memory.heap import return_free_blocks, return_large_blocks
from ..runtime.assembly import assemble
from ..runtime.division import Division, cpu_limit, expect_machine_has, with_unit_room
from ..runtime.needs import memory_needs, unit_bytes
from ..runtime.opening import OpenedCheckpoint, open_checkpoint
from ..runtime.options import LoadOptions
from ..window.planning import WindowPlan, smallest_window
from .choosing import Chooser, Chosen
from .file import read_members
from .pool import Pool, PooledWindow


@dataclass(frozen=True, kw_only=True, eq=False)
class Members:
    """Models that share one memory.

    Args:
        models: transformers models by name; each has its `offload`, and may be called like any other.
        folders: where each lies.
        chooser: says who answers.
        pool: their memory.
    """

    models: Mapping[str, Any]
    folders: Mapping[str, str]
    chooser: Chooser
    pool: Pool

    def choose(self, prompt: str, label: str | None = None, *, is_next: bool = True) -> Chosen:
        """Who answers a prompt. Its weights are read from now on, while the caller prepares the prompt.

        Args:
            prompt: its text.
            label: whom the request asks for; None lets the prompt decide.
            is_next: whether it is computed next; a request that may wait in a queue reads nothing yet.

        Raises:
            ValueError: if nobody has that label.
        """
        chosen = self.chooser.choose(prompt, label)
        self.pool.note_request(list(self.models).index(chosen.name))
        if is_next:
            self.models[chosen.name].offload.runtime.guests.begin()
        return chosen

    def report(self) -> dict[str, Any]:
        """Of each member: its popularity, what its window has done, and its hidden units; JSON-serialisable."""
        reports = {name: model.offload.report() for name, model in self.models.items()}
        popularity = dict(zip(self.models, self.pool.popularity, strict=True))
        return {
            name: {
                "popularity": popularity[name],
                **report["window"],
                **({"units": report["units"]} if "units" in report else {}),
            }
            for name, report in reports.items()
        }

    def close(self) -> None:
        """Stop all reading threads and give the pool's memory back; no member can run afterwards."""
        for model in self.models.values():
            model.offload.close()
        self.pool.close()


def load_members(
    file: str | Path,
    *,
    cpu_memory: str | int = "auto",
    context: int = 2048,
    arithmetic: str = "auto",
    io: str = "auto",
    io_threads: int = 4,
    is_shared: bool = False,
) -> Members:
    """Open several models in one budget. No layer is read before a member is chosen or called.

    Args:
        file: YAML that names the members, see `MembersFile`.
        cpu_memory: the whole budget of the process, as for `load`.
        context: tokens of one request; members compute in turn, so memory is kept for the largest.
        arithmetic, io, io_threads: as for `load`, for each member.
        is_shared: whether all members keep the tokens of their users at the same time, as engines do; otherwise memory
            is kept for the KV cache of one.

    Raises:
        ValueError: if the file or a checkpoint is damaged, a member is a GGUF file or cannot be streamed, or the budget
            is too small.
    """
    described = read_members(Path(file))
    chooser = Chooser(described.rules(), described.default)
    shared = LoadOptions(
        path_or_id="", cpu_memory=cpu_memory, context=context, arithmetic=arithmetic, io=io, io_threads=io_threads
    )
    expect_machine_has(shared)
    return_large_blocks()
    packs = [None if row.pack is None else described.folder / row.pack for row in described.members]
    folders = [described.model_of(row) for row in described.members]
    options = [replace(shared, path_or_id=path, pack=pack) for path, pack in zip(folders, packs, strict=True)]
    opened = [_open(one) for one in options]
    needs = [memory_needs(one, each) for one, each in zip(opened, options, strict=True)]
    room = _room(opened, needs, cpu_limit(shared), is_shared=is_shared)
    opened, pool_bytes = _divide(opened, room)
    needs = [memory_needs(one, each) for one, each in zip(opened, options, strict=True)]
    pool = Pool(pool_bytes, len(opened))
    models = {
        row.name: _assemble(one, need, each, pool, member)
        for member, (row, one, need, each) in enumerate(zip(described.members, opened, needs, options, strict=True))
    }
    return Members(
        models=models,
        folders=dict(zip(models, folders, strict=True)),
        chooser=chooser,
        pool=pool,
    )


def _open(options: LoadOptions) -> OpenedCheckpoint:
    opened = open_checkpoint(options, lambda headers: _all_streamed(headers, options))
    if opened.window is None:
        raise ValueError(f"model {options.path_or_id}: a GGUF file cannot be streamed, so it cannot be a member")
    move_to_huge_pages(opened.model, opened.streamed)
    return_free_blocks()
    return opened


def _all_streamed(headers: OpenedCheckpoint, options: LoadOptions) -> WindowPlan:
    if not headers.guests.passing:
        raise ValueError(f"model {options.path_or_id}: it has no layers that can be streamed, so it cannot be a member")
    return smallest_window(headers.guests)


def _room(opened: list[OpenedCheckpoint], needs: list[Needs], limit: int, *, is_shared: bool) -> int:
    """What a budget leaves for layers and hidden units.

    Raises:
        ValueError: if that is less than the largest layer of a member.
    """
    # members compute in turn: of what a pass takes, the largest counts once
    kept = sum if is_shared else max
    together = Needs(
        process_bytes=needs[0].process_bytes,
        weight_bytes=sum(each.weight_bytes for each in needs),
        kv_bytes=kept(each.kv_bytes for each in needs),
        activation_bytes=max(each.activation_bytes for each in needs),
        staging_bytes=sum(each.staging_bytes for each in needs),
        window_bytes=sum(one.window.row_bytes + unit_bytes(one) for one in opened if one.window),
    )
    experts = sum(_least_slots(one) for one in opened)
    room = room_besides(limit, together, (), (), 0) - experts
    least = _largest_layer(opened)
    if room < least:
        raise ValueError(
            f"{format_size(limit)} is too small for {len(opened)} members: their largest layer takes "
            f"{format_size(least)} and {format_size(max(room, 0))} are left; give at least "
            f"{sufficient_size(limit + least - room)}"
        )
    return room


def _largest_layer(opened: list[OpenedCheckpoint]) -> int:
    return max(one.window.ring_bytes for one in opened if one.window)


def _divide(opened: list[OpenedCheckpoint], room: int) -> tuple[list[OpenedCheckpoint], int]:
    """Members with as many of their hidden units as fit, and the size of the pool: of both the same share."""
    layers = sum(guest.form.slot_bytes for one in opened for guest in one.guests.passing)
    units = sum(one.bundle.nbytes for one in opened if one.bundle)
    pool_bytes = min(layers, max(_largest_layer(opened), room * layers // (layers + units)))
    left = room - pool_bytes
    divided = [with_unit_room(one, left * one.bundle.nbytes // units) if one.bundle else one for one in opened]
    return divided, pool_bytes


def _least_slots(opened: OpenedCheckpoint) -> int:
    """Bytes of slots for the experts of one token."""
    sizes = zip(opened.experts_L, opened.slot_bytes_L, strict=True)
    return sum(min(opened.top_k, count) * size for count, size in sizes)


def _assemble(opened: OpenedCheckpoint, needs: Needs, options: LoadOptions, pool: Pool, member: int) -> Any:
    slots = [min(opened.top_k, count) for count in opened.experts_L]
    plan = plan_memory(cpu_limit(options), needs, opened.slot_bytes_L, opened.experts_L, opened.top_k, slots)
    division = Division(ram=plan, gpu=None, starting=None)
    model = assemble(opened, division, options, None, partial(PooledWindow, pool=pool, member=member))
    model.forward = _in_turn(pool, model.forward)
    return model


def _in_turn(pool: Pool, forward: Callable[..., Any]) -> Callable[..., Any]:
    """One pass of one member at a time: two would throw out each other's layers, and need twice the activations."""

    @wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        with pool.turn:
            return forward(*args, **kwargs)

    return call
