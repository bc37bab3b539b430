"""What fine-tuning would take, from the headers of a checkpoint: memory, traffic of the disk, seconds, wear.

How many experts a step touches is not known before it runs. Here tokens choose at random, which touches the most:
E (1 - (1 - K/E)^T) of a layer's experts. Text touches fewer, so traffic and memory are upper estimates.

Shapes: T tokens, K experts per token, E experts.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import Any, get_args

import torch

from routing.ground.hardware import Hardware

from ..checkpoint.location import heads_of
from ..compute.resident import embedding_bytes, weight_bytes
from ..formats.form import Form
from ..memory.budget import MemoryPlan
from ..runtime.opening import OpenedCheckpoint, open_headers
from ..runtime.options import LoadOptions
from .methods import forward_only
from .methods.adapters import adapter_bytes
from .methods.all_parameters import GRADIENT_BYTES, held_bytes
from .methods.record_layout import RecordLayout
from .options import TuneOptions
from .passing.opening import divide_for_tuning, kept_arrays, layer_activation_bytes
from .storage.activation_plan import StepLoad, UnitCost, choose
from .storage.units import Choice

FLOPS_OF_EXPERTS = {"zo": 4, "lora": 6, "full": 8}
"""Per token and weight: two for each product. Two passes; forward, once more, inputs; the same and weights."""
FLOPS_OF_OTHERS = {"zo": 4, "lora": 4, "full": 6}
"""Likewise outside experts, where nothing is computed twice."""
LARGEST_BATCH = 1 << 24
"""Tokens per step; beyond some millions nobody fine-tunes."""
DAY_S = 86_400
"""Seconds of a day."""
PRODUCT_ROWS, PRODUCT_S = 256, 0.2
"""Rows that an expert has in a large batch, and seconds of measuring: long enough for some products. Not tuned."""


@dataclass(frozen=True, eq=False)
class TuneForecast:
    """What a step of fine-tuning would take.

    Args:
        method: name in METHODS.
        forms: how each layer's experts are stored.
        top_k: K, as the config names it.
        plan: the division of memory; None if the budget is too small.
        shortfall: which budget would do, if it is too small.
        other_elements: parameters outside experts, input embedding excluded.
        disk_bytes: what a run keeps on the disk at most, besides the checkpoint.
        state_bits: of moments in records.
        activations: of each micro-batch in each decoder layer; seconds are not known yet.
        activation_limit: bytes of activations in memory; None keeps all.
    """

    method: str
    forms: list[Form]
    top_k: int
    plan: MemoryPlan | None
    shortfall: str | None
    other_elements: int
    disk_bytes: int
    state_bits: int = 32
    activations: Sequence[UnitCost] = ()
    activation_limit: int | None = None

    @property
    def num_slots(self) -> int:
        """Of all layers together."""
        return sum(self.plan.num_slots) if self.plan else 0

    def touched(self, tokens: int) -> list[float]:
        """Experts of each layer that a step of so many tokens touches."""
        counts = [form.layer.num_experts for form in self.forms]
        return [count * (1 - (1 - min(self.top_k / count, 1)) ** tokens) for count in counts]

    def traffic(self, tokens: int) -> tuple[float, float]:
        """Bytes that a step of so many tokens reads and writes.

        `zo` reads each touched expert once, `lora` and `full` twice, less what slots keep. `full` also reads and
        writes each record at the step, and of experts that missed steps once more at the fetch.
        """
        read = written = gradients = 0.0
        # a sweep over all layers finds in the slots what the last one left there
        touched_L, held = self.touched(tokens), self.num_slots
        share = 1 - min(held / sum(touched_L), 1)
        for form, touched in zip(self.forms, touched_L, strict=True):
            read += share * touched * form.expert_bytes * (1 if self.method == "zo" else 2)
            if self.method == "zo":
                written += touched * form.layer.plain_bytes
            if self.method == "full":
                late = touched * (1 - touched / form.layer.num_experts)
                layout = RecordLayout(form, self.state_bits)
                read += (touched + late) * layout.nbytes
                written += (touched + late) * layout.nbytes
                gradients += touched * 4 * layout.num_elements
        spilled = max(gradients - GRADIENT_BYTES, 0.0)
        return read + spilled, written + spilled

    def compute_s(self, tokens: int, flops_per_s: float) -> float:
        """Seconds of a step's products."""
        active = sum(RecordLayout(form).num_elements * min(self.top_k, form.layer.num_experts) for form in self.forms)
        flops = FLOPS_OF_EXPERTS[self.method] * active + FLOPS_OF_OTHERS[self.method] * self.other_elements
        return tokens * flops / flops_per_s

    def disk_s(self, tokens: int, hardware: Hardware) -> float:
        """Seconds of a step's reads and writes; writes are taken to be as fast as reads, which nothing measures."""
        return sum(self.traffic(tokens)) / hardware.disk_bytes_per_s

    def choices(self, tokens: int, hardware: Hardware, flops_per_s: float) -> tuple[list[Choice], StepLoad]:
        """What becomes of activations, and the step with that, as a run chooses once it has measured a step."""
        flops = FLOPS_OF_OTHERS["zo"] / 2 * self.other_elements * tokens
        rerun_s = flops / flops_per_s / max(len(self.activations), 1)
        units = [replace(unit, rerun_s=rerun_s) for unit in self.activations]
        limit = inf if self.activation_limit is None else self.activation_limit
        load = StepLoad(self.disk_s(tokens, hardware), self.compute_s(tokens, flops_per_s), hardware.disk_bytes_per_s)
        found = choose(units, 0, limit, load)
        return found, load.with_choices(units, found)

    def enough_tokens(self, hardware: Hardware, flops_per_s: float) -> int | None:
        """The fewest tokens per step, a power of two, whose products take as long as the disk; None if none do."""
        tokens = 1
        while tokens <= LARGEST_BATCH:
            if self.compute_s(tokens, flops_per_s) >= self.disk_s(tokens, hardware):
                return tokens
            tokens *= 2
        return None

    def as_json(self, tokens: int, hardware: Hardware | None, flops_per_s: float | None) -> dict[str, Any]:
        """The forecast of a step of so many tokens; rates add seconds, the batch and the wear."""
        read, written = self.traffic(tokens)
        found: dict[str, Any] = {
            "method": self.method,
            "fits": self.plan is not None,
            "reason": self.shortfall,
            "tokens_per_step": tokens,
            "slots": self.num_slots if self.plan else None,
            "experts_touched_per_layer": self.touched(tokens),
            "bytes_read_per_step": read,
            "bytes_written_per_step": written,
            "disk_bytes": self.disk_bytes,
        }
        if hardware is not None and flops_per_s is not None:
            choices, load = self.choices(tokens, hardware, flops_per_s)
            step_s, count = load.seconds, max(len(choices), 1)
            found |= {
                "disk_s": load.disk_s,
                "compute_s": load.compute_s,
                "step_s": step_s,
                "binds": "disk" if load.disk_s > load.compute_s else "products",
                "activation_shares": {name: choices.count(name) / count for name in get_args(Choice)},
                "tokens_where_disk_no_longer_binds": self.enough_tokens(hardware, flops_per_s),
                "written_tb_per_day": written / step_s * DAY_S / 1e12,
            }
        return found


def foresee(model: str | Path, options: TuneOptions, cpu_memory: str | int = "auto") -> TuneForecast:
    """What fine-tuning a model would take, without a weight of it.

    Args:
        model: a Hugging Face model folder, a GGUF file, or a model id, of which only heads are downloaded.
        options: the run's settings.
        cpu_memory: the whole budget of the process.

    Raises:
        ValueError: if the checkpoint is damaged or dense.
    """
    tokens = options.batch_size * options.sequence_length
    loading = LoadOptions(path_or_id=model, cpu_memory=cpu_memory, context=tokens, dtype=options.dtype)
    with heads_of(model) as place:
        opened = open_headers(place, None)
    if not opened.forms:
        raise ValueError(f"model {model}: a dense model has no experts to keep on disk; fine-tune it with PEFT")
    plan, shortfall = None, None
    try:
        plan = divide_for_tuning(opened, loading, options, _kept(options)(opened))
    except ValueError as error:
        shortfall = str(error)
    return TuneForecast(
        method=options.method,
        forms=opened.forms,
        top_k=opened.top_k,
        plan=plan,
        shortfall=shortfall,
        other_elements=(weight_bytes(opened.model) - embedding_bytes(opened.model)) // opened.model.dtype.itemsize,
        disk_bytes=_disk_bytes(opened, options),
        state_bits=options.state_bits,
        activations=_activations(opened, options),
        activation_limit=options.activation_bytes,
    )


def _activations(opened: OpenedCheckpoint, options: TuneOptions) -> list[UnitCost]:
    if options.method == "zo":
        return []
    nbytes = layer_activation_bytes(opened, options)
    # what goes into the layer, and what its experts give
    unit = UnitCost(nbytes=nbytes, held_bytes=2 * nbytes / kept_arrays(opened, options), rerun_s=0.0)
    return [unit] * (options.own_passes * int(opened.config.get_text_config().num_hidden_layers))


def _kept(options: TuneOptions) -> Callable[[OpenedCheckpoint], int]:
    kept: dict[str, Callable[[OpenedCheckpoint], int]] = {
        "zo": forward_only.held_bytes,
        "full": lambda opened: held_bytes(opened, options),
        "lora": lambda opened: adapter_bytes(opened, options),
    }
    return kept[options.method]


def _disk_bytes(opened: OpenedCheckpoint, options: TuneOptions) -> int:
    """Records of all experts, twice: a commit keeps its places until the next one is whole."""
    if options.method == "lora":
        return adapter_bytes(opened, options)
    total = 0
    for form in opened.forms:
        is_full = options.method == "full"
        of_one = RecordLayout(form, options.state_bits).nbytes if is_full else form.layer.plain_bytes
        total += of_one * form.layer.num_experts
    return 2 * total


def product_flops(forms: list[Form]) -> float:
    """Operations per second of a product with one expert's first matrix, measured here for a fraction of a second."""
    parameter = forms[0].layer.parameters[0]
    weight = torch.ones(parameter.shape, dtype=parameter.dtype)
    rows = torch.ones(PRODUCT_ROWS, parameter.shape[1], dtype=parameter.dtype)
    rows @ weight.t()
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < PRODUCT_S:
        rows @ weight.t()
        count += 1
    return count * 2 * PRODUCT_ROWS * weight.numel() / (time.perf_counter() - started)


def default_options(method: str, tokens: int, activation_bytes: int | None = None) -> TuneOptions:
    """Settings of a step of so many tokens in one row."""
    return TuneOptions(method=method, steps=1, sequence_length=tokens, activation_bytes=activation_bytes)
