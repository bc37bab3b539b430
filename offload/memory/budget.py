"""Memory: what the process may use, what it needs besides experts, and how many expert slots the rest pays for.

Without torch.
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from routing.ground.model_config import text_config
from routing.ground.quantity import format_size

from .groups import cgroup_limit, cgroup_room

SLACK_SHARE, MIN_SLACK_BYTES = 0.03, 96 << 20
"""What the allocator holds and does not use, and libraries that come with the first token: 40 to 80 MiB were seen, more
with more memory in use. Memory that nothing will use needs none."""
AUTO_SHARE = 0.9
"""Of the free memory, so that other processes can grow a little while the model runs. Other values were not tried."""


def available_memory() -> int:
    """Bytes that this process may still hope to use in total: what is free and what it has, beside its neighbours.

    The machine and every control group above the process count, each with what others hold in it.
    """
    own = resident_bytes()
    total = _meminfo("MemAvailable") + own
    room = cgroup_room(own)
    return total if room is None else min(total, room)


def machine_bytes() -> int:
    """The most that any process here can have: the machine's memory, or the limit of the control group."""
    limit = cgroup_limit()
    return _meminfo("MemTotal") if limit is None else min(_meminfo("MemTotal"), limit)


def _meminfo(name: str) -> int:
    for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    raise OSError(f"/proc/meminfo does not say {name}")


def resident_bytes() -> int:
    """Memory of this process now."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak_bytes() -> int:
    """The most memory this process has had."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    return resident_bytes()


def kv_bytes_per_token(config: Any, item_bytes: int) -> int:
    """An upper bound of the KV cache that one token takes in all layers, from the names that configs share."""
    text = text_config(config)
    num_layers = int(getattr(text, "num_hidden_layers", 0) or 0)
    layers = text.per_layer_config if getattr(text, "is_heterogeneous", False) else [text] * num_layers
    return sum(_kv_width(layers[layer]) for layer in range(num_layers)) * item_bytes


def _kv_width(config: Any) -> int:
    """Elements of keys and values of one token in one layer."""
    heads = int(getattr(config, "num_attention_heads", 0) or 0)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    width = int(getattr(config, "hidden_size", 0) or 0)
    head = int(getattr(config, "head_dim", None) or (width // heads if heads else 0))
    key = max(int(getattr(config, "qk_head_dim", None) or head), head)
    value = max(int(getattr(config, "v_head_dim", None) or head), head)
    return kv_heads * (key + value)


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """How one memory budget is divided, in bytes; `num_slots` is the number of expert slots of each MoE layer."""

    limit_bytes: int
    process_bytes: int
    weight_bytes: int
    kv_bytes: int
    activation_bytes: int
    staging_bytes: int
    slack_bytes: int
    slot_bytes: int
    num_slots: tuple[int, ...]
    window_bytes: int = 0

    @property
    def fixed_bytes(self) -> int:
        return (
            self.process_bytes
            + self.weight_bytes
            + self.kv_bytes
            + self.activation_bytes
            + self.staging_bytes
            + self.slack_bytes
            + self.window_bytes
        )

    @property
    def room_bytes(self) -> int:
        """What the budget leaves for expert slots, with the slack of a budget that is used up."""
        return self.limit_bytes - (self.fixed_bytes - self.slack_bytes) - _slack(self.limit_bytes, self.limit_bytes)

    def table(self) -> list[tuple[str, int]]:
        """What the budget goes to, for people."""
        return [
            ("Python and libraries", self.process_bytes),
            ("weights that stay resident", self.weight_bytes),
            *([("window of streamed weights", self.window_bytes)] if self.window_bytes else []),
            ("KV cache", self.kv_bytes),
            ("activations", self.activation_bytes),
            ("reading buffers", self.staging_bytes),
            ("slack of the allocator", self.slack_bytes),
            (f"expert slots ({sum(self.num_slots)})", self.slot_bytes),
        ]


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a model needs besides expert slots, in bytes; `window_bytes` stand for weights that are streamed."""

    process_bytes: int
    weight_bytes: int
    kv_bytes: int
    activation_bytes: int
    staging_bytes: int
    window_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class Budgets:
    """Budgets between which a model gains from more, in bytes.

    Args:
        least_bytes: the smallest that is accepted: one token's experts fit.
        all_bytes: the smallest that holds all experts; more gains nothing.
    """

    least_bytes: int
    all_bytes: int


def expect_budgets(
    needs: Needs,
    slot_bytes_L: Sequence[int],
    experts_L: Sequence[int],
    top_k: int,
    loading_bytes: int = 0,
    whole_bytes: int | None = None,
) -> Budgets:
    """The least budget of a model, and the one that holds all its experts, by the arithmetic of `plan_memory`.

    Args:
        needs: everything that is not expert slots.
        slot_bytes_L: bytes of a slot in each layer.
        experts_L: experts of each layer.
        top_k: experts that one token uses in one layer.
        loading_bytes: what loading takes for a moment, before there are slots.
        whole_bytes: of all experts in slots of their own sizes; None if slots of a layer are alike.
    """
    besides = sum(vars(needs).values())
    least = sum(min(top_k, count) * size for count, size in zip(experts_L, slot_bytes_L, strict=True))
    whole = besides + (_bytes_of_all(slot_bytes_L, experts_L) if whole_bytes is None else whole_bytes)
    least_bytes = max(_with_slack(besides + least, whole), loading_bytes)
    return Budgets(least_bytes=least_bytes, all_bytes=max(_with_slack(whole, whole), loading_bytes))


def _with_slack(nbytes: int, most_bytes: int) -> int:
    """The least budget that leaves `nbytes` besides its slack."""
    limit = nbytes
    while (enough := nbytes + _slack(limit, most_bytes)) > limit:
        limit = enough
    return limit


def _slack(limit_bytes: int, most_bytes: int) -> int:
    return max(int(SLACK_SHARE * min(limit_bytes, most_bytes)), MIN_SLACK_BYTES)


def _bytes_of_all(slot_bytes_L: Sequence[int], experts_L: Sequence[int]) -> int:
    return sum(count * size for count, size in zip(experts_L, slot_bytes_L, strict=True))


def bytes_for_experts(limit_bytes: int, needs: Needs) -> int:
    """What a budget leaves for expert slots."""
    return limit_bytes - sum(vars(needs).values()) - _slack(limit_bytes, limit_bytes)


def plan_memory(
    limit_bytes: int,
    needs: Needs,
    slot_bytes_L: Sequence[int],
    experts_L: Sequence[int],
    top_k: int,
    num_slots: Sequence[int] | None = None,
    loading_bytes: int = 0,
    whole_bytes: int | None = None,
) -> MemoryPlan:
    """Divide a budget; slots are spread evenly over the layers, as many as fit and at most all experts.

    Where all experts fit, each may have a slot of its own size.

    Args:
        limit_bytes: the whole budget.
        needs: everything that is not expert slots.
        slot_bytes_L: bytes of a slot in each layer.
        experts_L: experts of each layer.
        top_k: experts that one token uses in one layer; fewer slots are refused.
        num_slots: slots of each layer, if they are already decided.
        loading_bytes: what loading takes for a moment; only the budget that a refusal names looks at it.
        whole_bytes: of all experts in slots of their own sizes; None if slots of a layer are alike.

    Raises:
        ValueError: if fewer than `top_k` slots per layer fit; the message says which budget would do.
    """
    besides = sum(vars(needs).values())
    slack = _slack(limit_bytes, besides + _bytes_of_all(slot_bytes_L, experts_L))
    fixed = besides + slack
    least = [min(top_k, count) for count in experts_L]
    floor = sum(count * size for count, size in zip(least, slot_bytes_L, strict=True))
    if whole_bytes is not None and num_slots in (None, list(experts_L)):
        fixed_to_all = besides + _slack(limit_bytes, besides + whole_bytes)
        if fixed_to_all + whole_bytes <= limit_bytes or num_slots is not None:
            return MemoryPlan(
                limit_bytes=limit_bytes,
                **vars(needs),
                slack_bytes=fixed_to_all - besides,
                slot_bytes=whole_bytes,
                num_slots=tuple(experts_L),
            )
    if num_slots is None:
        if fixed + floor > limit_bytes:
            enough = expect_budgets(needs, slot_bytes_L, experts_L, top_k, loading_bytes).least_bytes
            if not experts_L:
                raise ValueError(
                    f"{format_size(limit_bytes)} is too small for a dense model's layers in memory: "
                    f"{format_size(fixed)} are needed; give at least {sufficient_size(enough)}"
                )
            raise ValueError(
                f"{format_size(limit_bytes)} is too small for one token's experts: {format_size(fixed)} are needed "
                f"besides experts and {format_size(floor)} for {top_k} experts in each of {len(experts_L)} layers; "
                f"give at least {sufficient_size(enough)}{_shorter_context(needs, limit_bytes)}"
            )
        num_slots = spread_slots(limit_bytes - fixed, slot_bytes_L, experts_L, least)
    slot_bytes = sum(count * size for count, size in zip(num_slots, slot_bytes_L, strict=True))
    return MemoryPlan(
        limit_bytes=limit_bytes, **vars(needs), slack_bytes=slack, slot_bytes=slot_bytes, num_slots=tuple(num_slots)
    )


def _shorter_context(needs: Needs, limit_bytes: int) -> str:
    """A hint where keys and values take much of a budget: servers hold the whole context that a model knows."""
    if 4 * needs.kv_bytes < limit_bytes:
        return ""
    return f", or a smaller --context: keys and values take {format_size(needs.kv_bytes)}"


def room_besides(
    limit_bytes: int, needs: Needs, slot_bytes_L: Sequence[int], experts_L: Sequence[int], top_k: int
) -> int:
    """What a budget leaves besides these needs and the experts of one token; negative if it is too small for them.

    Args:
        limit_bytes: the whole budget.
        needs: all that is not expert slots; of weights, those that are no part of what the room is for.
        slot_bytes_L, experts_L, top_k: as for `plan_memory`.
    """
    besides = sum(vars(needs).values())
    least = sum(min(top_k, count) * size for count, size in zip(experts_L, slot_bytes_L, strict=True))
    return limit_bytes - _slack(limit_bytes, limit_bytes) - besides - least


def sufficient_size(nbytes: int) -> str:
    """A size as people read it, rounded up, so that it is enough when it is typed."""
    unit, scale = ("GiB", 1 << 30) if nbytes >= 1 << 30 else ("MiB", 1 << 20)
    return f"{math.ceil(100 * nbytes / scale + 1e-6) / 100:.2f} {unit}"


def spread_slots(
    free_bytes: int, slot_bytes_L: Sequence[int], experts_L: Sequence[int], least_L: Sequence[int]
) -> list[int]:
    """As many slots as fit, one layer after the other in turn, never more than a layer has experts."""
    slots = list(least_L)
    free = free_bytes - sum(count * size for count, size in zip(slots, slot_bytes_L, strict=True))
    grew = True
    while grew:
        grew = False
        for layer, size in enumerate(slot_bytes_L):
            if slots[layer] < experts_L[layer] and size <= free:
                slots[layer] += 1
                free -= size
                grew = True
    return slots


def describe(plan: MemoryPlan) -> Mapping[str, int | list[int]]:
    """A plan as JSON."""
    return {
        **{name: value for name, value in vars(plan).items() if name != "num_slots"},
        "num_slots": list(plan.num_slots),
    }
