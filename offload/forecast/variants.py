"""Which way of running a model is quickest here: as it is stored, with other arithmetic, compressed, in more memory.

Speeds are a range, because nobody knows the routing before the model has run.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from routing.ground.hardware import Hardware

from ..formats.compression import CompressedMatrix, can_compress
from ..formats.form import BLOCK_BYTES
from ..memory.budget import MemoryPlan, plan_memory, sufficient_size
from ..memory.cost import DecodeWork, Prediction, expected_hit_rate, predict_decode
from .fit import Fit

BEST_EXPONENT = 4.4
"""As `MISS_EXPONENT`, of the best that was seen: `learned` hits 71 to 73 % with a quarter of the experts on the
GPT-OSS-20B trace of experiments/records/2026-11-29_cache-policies. Routing that repeats itself more would do better."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way of running a model.

    Args:
        what: for people.
        options: of `generate` and `load`, beside the model's name.
        expert_bytes: all experts as they are stored.
        budget_bytes: memory of the process.
        share: of all experts, 0 to 1, that stay in memory.
        least: tokens per second if experts are asked for evenly, so that only the share of them is found.
        expected: tokens per second at a hit rate that is typical for the share.
        most: tokens per second at the best hit rate seen, with reading and computing fully overlapped.
        binds: what limits the expected speed.
    """

    what: str
    options: str
    expert_bytes: int
    budget_bytes: int
    share: float
    least: float
    expected: float
    most: float
    binds: str

    def as_json(self) -> dict[str, Any]:
        return dict(vars(self))


def variants_of(fitted: Fit, hardware: Hardware) -> list[Variant]:
    """The ways of running a model that this budget allows, quickest first, then one with all experts in memory.

    Args:
        fitted: a model that fits its budget, planned without a GPU.
        hardware: measured rates of this machine.
    """
    assert fitted.plan is not None
    here = list(_at_this_budget(fitted, fitted.plan, hardware))
    here.sort(key=lambda variant: -variant.expected)
    if fitted.budgets.all_bytes > fitted.plan.limit_bytes and fitted.forms:
        slots = [form.slot_bytes for form in fitted.forms]
        plan = _plan(fitted, fitted.budgets.all_bytes, slots)
        if plan is not None:
            size = sufficient_size(plan.limit_bytes)
            rate = fitted.forms[0].token_rate(hardware, is_fast=False)
            here.append(_variant("all experts in memory", f"--cpu-memory '{size}'", fitted, plan, hardware, rate))
    return here


def _at_this_budget(fitted: Fit, plan: MemoryPlan, hardware: Hardware) -> Iterator[Variant]:
    if not fitted.forms:
        exact, fast = (hardware.token_rate(is_fast=is_fast) for is_fast in (False, True))
    else:
        exact, fast = (fitted.forms[0].token_rate(hardware, is_fast=is_fast) for is_fast in (False, True))
    yield _variant("as stored", "", fitted, plan, hardware, exact)
    if fast != exact:
        yield _variant("as stored, other last bits", "--arithmetic fast", fitted, plan, hardware, fast)
    sizes = _compressed_bytes(fitted)
    if sizes is None or not hardware.compressed_bytes_per_s:
        return
    packed = _plan(fitted, plan.limit_bytes, [-(-size // BLOCK_BYTES) * BLOCK_BYTES for size in sizes])
    if packed is not None:
        rate = hardware.compressed_bytes_per_s
        yield _variant("compressed copy", "--pack (of pack --compress)", fitted, packed, hardware, rate, sizes)


def _compressed_bytes(fitted: Fit) -> list[int] | None:
    """Expected bytes of a compressed expert of each layer; None if some cannot be, or are codes already."""
    matrix = CompressedMatrix()
    sizes = []
    for form in fitted.forms:
        shapes = [(parameter.shape, parameter.dtype) for parameter in form.layer.parameters]
        if form.name != "plain" or not all(can_compress(*shape) for shape in shapes):
            return None
        sizes.append(sum(matrix.expected_bytes((shape[0], shape[1])) for shape, _ in shapes))
    return sizes or None


def _plan(fitted: Fit, limit_bytes: int, slot_bytes_L: list[int]) -> MemoryPlan | None:
    counts = [form.layer.num_experts for form in fitted.forms]
    try:
        return plan_memory(limit_bytes, fitted.needs, slot_bytes_L, counts, fitted.top_k)
    except ValueError:
        return None


def _variant(
    what: str,
    options: str,
    fitted: Fit,
    plan: MemoryPlan,
    hardware: Hardware,
    rate: float,
    expert_bytes_L: list[int] | None = None,
) -> Variant:
    counts = [form.layer.num_experts for form in fitted.forms]
    sizes = expert_bytes_L or [form.expert_bytes for form in fitted.forms]
    total = sum(count * size for count, size in zip(counts, sizes, strict=True))
    share = sum(plan.num_slots) / max(sum(counts), 1) if counts else 1.0

    def predicted(hit_rate: float) -> Prediction:
        work = DecodeWork(
            num_layers=len(counts),
            experts_per_layer=fitted.top_k,
            expert_bytes=total // max(sum(counts), 1),
            resident_bytes=fitted.dense_bytes - fitted.unread_bytes,
            hit_rate=hit_rate,
            streamed_bytes=fitted.streamed_bytes,
        )
        return predict_decode(work, hardware, rate=rate)

    typical = expected_hit_rate(share, fitted.top_k, counts[0]) if counts else 1.0
    expected = predicted(typical)
    return Variant(
        what=what,
        options=options,
        expert_bytes=total,
        budget_bytes=plan.limit_bytes,
        share=share,
        least=1 / predicted(min(share, typical)).token_s,
        expected=1 / expected.token_s,
        most=1 / predicted(max(typical, 1 - (1 - share) ** BEST_EXPONENT)).floor_s,
        binds=expected.binds,
    )
