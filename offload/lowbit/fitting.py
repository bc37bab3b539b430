"""`pack --fit`: as many bits for each matrix as a budget of the whole process allows, where they are worth most."""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from routing.ground.hardware import Hardware
from routing.ground.quantity import format_size

from ..forecast.fit import Fit
from ..formats.form import BLOCK_BYTES
from ..formats.lossy.low_bit import HEAD_BYTES, SchemeNames, record_bytes
from ..formats.pack_index import PackIndex
from ..memory.budget import bytes_for_experts, sufficient_size
from ..memory.cost import DecodeWork, predict_decode
from ..store.packing import beside, expect_own
from .calibrating import SENSITIVITY
from .choosing import Choice, choose
from .inputs import RecordedInputs
from .measuring import Unit, measure
from .quantise import GROUP, Source
from .usage import Usage
from .writing import Work, write_low_bit

CANDIDATES = ("int2", "int3", "int4", "int8")


@dataclass(frozen=True, eq=False)
class FittedBits:
    """The bits of every matrix, and what is expected of them.

    Args:
        schemes_L: of each expert of each layer; empty for layers that were quantised already.
        choice: what the programme found.
        units: what it chose among.
        divergence: expected, nats per token; None without a text to measure sensitivities on.
        budget_bytes: for experts.
    """

    schemes_L: list[list[SchemeNames]]
    choice: Choice
    units: Sequence[Unit]
    divergence: float | None
    budget_bytes: int

    @property
    def bits_per_weight(self) -> dict[str, int]:
        """Matrices of each scheme."""
        return dict(Counter(option.scheme for option in self.choice.options))

    def as_json(self) -> dict[str, Any]:
        return {
            "matrices": self.bits_per_weight,
            "expert_bytes": self.choice.nbytes,
            "budget_bytes": self.budget_bytes,
            "cost": self.choice.cost,
            "bound": self.choice.bound,
            "expected_divergence": self.divergence,
        }


def fit_bits(
    source: Source,
    fitted: Fit,
    limit_bytes: int,
    state_file: Path,
    *,
    group: int,
    method: str,
    usage: Usage,
    inputs: RecordedInputs | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> FittedBits:
    """Choose bits so that the process holds all experts within a budget.

    Args:
        source: the model; layers that are quantised already keep their bytes.
        fitted: what the model needs besides experts.
        limit_bytes: for the whole process.
        state_file: where measured experts are noted.
        group: columns that share a scale.
        method: that will quantise.
        usage: how much each expert counts.
        inputs: what experts see, with sensitivities.
        progress: told how many experts are measured, and how many there are.

    Raises:
        ValueError: if even the fewest bits do not fit.
    """
    budget = _expert_budget(source, fitted, limit_bytes, group)
    found = None if inputs is None else inputs.about.get(SENSITIVITY)
    sensitivity_L = [1.0] * len(source.forms) if found is None else [max(float(each), 1e-12) for each in found]
    forms = [(form, group) for form in CANDIDATES]
    units = measure(source, forms, usage, sensitivity_L, state_file, method, inputs, progress)
    choice = choose(units, budget)
    return FittedBits(schemes_of(source, units, choice), choice, units, None if found is None else choice.cost, budget)


def quantise_to_bits(
    path_or_id: str | Path, target: Path, bits: float, *, method: str, inputs: RecordedInputs, group: int = GROUP
) -> Choice:
    """Write a packed copy whose weights take so many stored bits on average, each matrix as many as it is worth.

    Args:
        path_or_id: folder or id of the model, not quantised.
        target: the file to write.
        bits: stored bits of a weight, scales included.
        method: one of METHODS.
        inputs: what experts see, with sensitivities.
        group: columns that share a scale.

    Raises:
        ValueError: if two bits for each matrix are more than that.
    """
    source = Source.opened(path_or_id)
    expect_own(target, source.layers, source.entries)
    candidates, sensitivity_L = [(form, group) for form in CANDIDATES], inputs.about[SENSITIVITY]
    state_file = beside(target, ".part.errors")
    units = measure(source, candidates, Usage(inputs), sensitivity_L, state_file, method, inputs)
    weights = sum(
        form.layer.num_experts * parameter.nbytes // parameter.dtype.itemsize
        for form in source.forms
        if form.name == "plain"
        for parameter in form.layer.parameters
    )
    choice = choose(units, int(weights * bits / 8))
    recipe = {"bits": bits, "method": method, "group": group}
    work = Work(source.model, source.forms, schemes_of(source, units, choice), method, inputs, recipe)
    write_low_bit(target, work, PackIndex.of(source.entries))
    state_file.unlink()
    return choice


def schemes_of(source: Source, units: Sequence[Unit], choice: Choice) -> list[list[SchemeNames]]:
    """The schemes of each expert of each layer, empty for layers that were quantised already."""
    chosen: dict[tuple[int, int], list[str]] = defaultdict(list)
    for unit, option in zip(units, choice.options, strict=True):
        chosen[unit.layer, unit.expert].append(option.scheme)
    return [
        [tuple(chosen[layer, expert]) for expert in range(form.layer.num_experts)] if form.name == "plain" else []
        for layer, form in enumerate(source.forms)
    ]


def _expert_budget(source: Source, fitted: Fit, limit_bytes: int, group: int) -> int:
    """What is left for the matrices: records begin with blocks, and one expert is expanded at a time."""
    plain = [form for form in source.forms if form.name == "plain"]
    room = sum({form.layer.plain_bytes for form in plain})
    kept = sum(form.layer.num_experts * form.slot_bytes for form in source.forms if form.name != "plain")
    records = sum(form.layer.num_experts for form in plain)
    left = bytes_for_experts(limit_bytes, fitted.needs) - room - kept - records * (HEAD_BYTES + BLOCK_BYTES)
    least = sum(
        form.layer.num_experts * record_bytes(form.layer, schemes[0], is_transposed=False)
        for form, schemes in zip(source.forms, source.uniform(CANDIDATES[0], group), strict=True)
        if schemes
    )
    if left < least:
        enough = limit_bytes - left + least
        enough += (
            bytes_for_experts(limit_bytes, fitted.needs)
            - bytes_for_experts(enough, fitted.needs)
            + enough
            - limit_bytes
        )
        raise ValueError(
            f"--fit {format_size(limit_bytes)} is too small: {format_size(limit_bytes - left)} are needed besides "
            f"experts, and {format_size(least)} for experts of two bits; give at least {sufficient_size(enough)}"
        )
    return left


def expected_speed(source: Source, fitted: Fit, bits: FittedBits, hardware: Hardware) -> float:
    """Tokens per second with all experts in memory.

    Args:
        hardware: of `calibrate`.
    """
    experts = sum(form.layer.num_experts for form in source.forms)
    stored = bits.choice.nbytes + sum(
        form.layer.num_experts * form.expert_bytes for form in source.forms if form.name != "plain"
    )
    work = DecodeWork(
        num_layers=len(source.forms),
        experts_per_layer=fitted.top_k,
        expert_bytes=stored // experts,
        resident_bytes=fitted.needs.weight_bytes - fitted.unread_bytes,
        hit_rate=1.0,
    )
    share = stored / sum(form.layer.num_experts * form.layer.plain_bytes for form in source.forms)
    return 1 / predict_decode(work, hardware, rate=hardware.exact_bytes_per_s * share).token_s
