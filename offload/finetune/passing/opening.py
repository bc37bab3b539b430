"""A model opened to be fine-tuned: its experts in slots, everything else in memory as transformers computes it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import Any

import torch

from routing.ground.quantity import format_size

from ...checkpoint.experts import ExpertLayer, experts_modules
from ...formats.form import Form
from ...memory.budget import MemoryPlan, expect_budgets, plan_memory, sufficient_size
from ...memory.heap import KeptBlocks, reuse_blocks
from ...runtime.division import cpu_limit, expect_machine_has
from ...runtime.needs import memory_needs
from ...runtime.opening import OpenedCheckpoint, open_checkpoint
from ...runtime.options import LoadOptions
from ...store.io_mode import wants_direct
from ...store.store import ExpertStore
from ..options import TuneOptions
from ..storage.activations import SpilledActivations
from ..storage.float8 import BYTES_PER_NUMBER
from ..storage.sweeps import Sweeps
from ..storage.visits import ExpertVisits
from .decoder_layers import divide_layers
from .experts import TunedExperts
from .lockstep import Lockstep
from .low_rank import MOST_RANK, summing_order

Overlay = Callable[[Sequence[Form]], list[Form]]

GAPS_BYTES = 400 << 20
"""What the limit has for freed blocks: they go back to the system where passes meet, once there are many."""
KEPT_ARRAYS, KEPT_ARRAYS_BY_C = 24, 12
"""Arrays of [T, D] that autograd keeps of one layer outside experts, and where our C computes linear layers and norms,
with room for families that keep more. Qwen3-MoE was seen to keep 18 and 9, OLMoE 19 and 10."""
LEAST_SLOTS = 4
"""An expert that is computed, and three on their way. Fewer are taken where `cache_experts` says so."""


@dataclass(frozen=True, eq=False)
class TunedModel:
    """A model whose experts are computed for passes that meet.

    Args:
        model: of transformers, in eval mode; all of it but the experts is in memory.
        experts: computes its experts modules.
        forms: how each layer's experts are stored.
        plan: how the memory budget was divided.
    """

    model: Any
    experts: TunedExperts
    forms: list[Form]
    plan: MemoryPlan

    @property
    def layers(self) -> list[ExpertLayer]:
        return [form.layer for form in self.forms]

    def close(self) -> None:
        """End threads, close files."""
        self.experts.lockstep.close()
        self.experts.visits.close()


def open_tuned(
    model: str | Path,
    options: TuneOptions,
    *,
    cache_experts: int | None = None,
    cpu_memory: str | int = "auto",
    overlay: Overlay = list,
    kept_bytes: Callable[[OpenedCheckpoint], int] = lambda opened: 0,
) -> TunedModel:
    """Open a model to be fine-tuned.

    Args:
        model: a Hugging Face model folder, or a model id.
        options: the run's settings; sizes of batches and the dtype are used.
        cache_experts: slots of each layer instead of what a budget pays for.
        cpu_memory: the whole budget of the process.
        overlay: what becomes of the checkpoint's forms, where the method changes experts.
        kept_bytes: what the method holds besides, from the opened checkpoint.

    Raises:
        ValueError: if the checkpoint is damaged, a dense model, one whose experts compute themselves, or the budget is
            too small.
    """
    tokens = options.batch_size * options.sequence_length
    loading = LoadOptions(
        path_or_id=model, cpu_memory=cpu_memory, cache_experts=cache_experts, context=tokens, dtype=options.dtype
    )
    expect_machine_has(loading)
    reuse_blocks()
    opened = open_checkpoint(loading)
    _expect_experts(opened, model)
    forms = overlay(opened.forms)
    opened = replace(opened, forms=forms)
    plan = divide_for_tuning(opened, loading, options, kept_bytes(opened))
    store = ExpertStore(opened.model, forms, is_direct=wants_direct("auto", plan, forms), checksums=None)
    has_backward = options.method != "zo"
    # `full` writes experts between two steps: what is read before that would be out of date
    sweeps = Sweeps(len(forms), is_round_trip=has_backward, crosses_steps=options.method != "full")
    visits = ExpertVisits(store, sum(plan.num_slots), sweeps)
    modules = list(experts_modules(opened.model).values())
    blocks = KeptBlocks(plan.limit_bytes - GAPS_BYTES, GAPS_BYTES)
    experts = TunedExperts(modules, visits, Lockstep(options.own_passes), blocks)
    opened.model.eval().requires_grad_(False)
    return TunedModel(opened.model, experts, forms, plan)


def spilled_activations(tuned: TunedModel, out: Path, options: TuneOptions) -> SpilledActivations | None:
    """Where activations go that exceed their share of memory; None if all of them stay."""
    if options.activation_bytes is None and options.activation_bits is None:
        return None
    out.mkdir(parents=True, exist_ok=True)
    resident = [*tuned.model.parameters(), *tuned.model.buffers()]
    limit = inf if options.activation_bytes is None else options.activation_bytes
    traffic, is_coded = tuned.experts.visits.traffic, options.activation_bits is not None
    spilled = SpilledActivations(limit, out, traffic, resident, is_coded=is_coded)
    tuned.experts.spilled = spilled
    divide_layers(tuned.model, spilled)
    return spilled


def _expect_experts(opened: OpenedCheckpoint, model: str | Path) -> None:
    if not opened.forms:
        raise ValueError(f"model {model}: a dense model has no experts to keep on disk; fine-tune it with PEFT")
    for name, module in experts_modules(opened.model).items():
        if getattr(module, "is_own_loop", False):
            raise ValueError(f"model {model}: {type(module).__name__} ({name}) computes its experts by itself")


def divide_for_tuning(
    opened: OpenedCheckpoint, loading: LoadOptions, options: TuneOptions, kept_bytes: int
) -> MemoryPlan:
    """Divide the budget: no KV cache, for each pass what autograd keeps of its layers, and one pool of slots.

    Args:
        opened: the model, or its skeleton.
        loading: the budget, and the tokens of a micro-batch as `context`.
        options: the run's settings.
        kept_bytes: what the method holds besides.

    Raises:
        ValueError: if the budget is too small; the message says which would do.
    """
    needs = memory_needs(opened, loading)
    activations = needs.activation_bytes + kept_activation_bytes(opened, options) + GAPS_BYTES
    needs = replace(needs, kv_bytes=0, activation_bytes=activations + kept_bytes)
    slot_bytes, num_experts = [max(opened.slot_bytes_L)], [sum(opened.experts_L)]
    if loading.cache_experts is not None:
        fixed = [sum(min(loading.cache_experts, count) for count in opened.experts_L)]
        return plan_memory(cpu_limit(loading), needs, slot_bytes, num_experts, LEAST_SLOTS, fixed)
    try:
        return plan_memory(cpu_limit(loading), needs, slot_bytes, num_experts, LEAST_SLOTS)
    except ValueError as error:
        besides = format_size(sum(vars(needs).values()))
        enough = sufficient_size(expect_budgets(needs, slot_bytes, num_experts, LEAST_SLOTS).least_bytes)
        raise ValueError(
            f"{format_size(cpu_limit(loading))} is too small to fine-tune this model: {besides} are needed besides "
            f"{LEAST_SLOTS} experts; give at least {enough}, shorter or fewer rows, or less --activation-memory"
        ) from error


def kept_activation_bytes(opened: OpenedCheckpoint, options: TuneOptions) -> int:
    """What all passes hold between two experts modules: hidden states; with gradients, what autograd keeps, too.

    Of each layer autograd keeps `kept_arrays`: norms in float32, projections, residuals, attention. Logits are in
    float32 with their gradient, of one pass at a time: each is through with its own before the next one goes on.
    """
    config = opened.config.get_text_config()
    tokens = options.batch_size * options.sequence_length
    width, item = int(config.hidden_size), opened.model.dtype.itemsize
    # where passes meet: rows as experts take them, their outputs, sums in a wider type, gradients by row and by token
    rows = 6 * options.own_passes * tokens * opened.top_k * width * item
    once = rows + 3 * 4 * tokens * int(config.vocab_size)
    if options.method == "zo":
        return options.own_passes * tokens * width * item * 2 + once
    one_layer = options.own_passes * tokens * width * item * kept_arrays(opened, options)
    kept = options.own_passes * layer_activation_bytes(opened, options) * int(config.num_hidden_layers)
    if options.activation_bytes is not None or options.activation_bits is not None:
        # of the layer that is computed, everything is in memory, with its gradients
        limit = kept if options.activation_bytes is None else options.activation_bytes
        kept = min(one_layer * int(config.num_hidden_layers), 2 * one_layer + min(kept, limit))
    return kept + once


def layer_activation_bytes(opened: OpenedCheckpoint, options: TuneOptions) -> int:
    """What autograd keeps of one micro-batch in one decoder layer."""
    width, item = int(opened.config.get_text_config().hidden_size), opened.model.dtype.itemsize
    in_bytes = item if options.activation_bits is None else min(BYTES_PER_NUMBER, item)
    return int(options.batch_size * options.sequence_length * width * in_bytes * kept_arrays(opened, options))


def kept_arrays(opened: OpenedCheckpoint, options: TuneOptions) -> int:
    """How many arrays of the model's width autograd keeps of a layer."""
    is_small = options.method == "lora" and options.rank <= MOST_RANK and opened.model.dtype == torch.bfloat16
    return KEPT_ARRAYS_BY_C if is_small and summing_order() is not None else KEPT_ARRAYS
