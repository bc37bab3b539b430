"""What a caller of fine-tuning asks for, checked before anything is read; without torch."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from routing.ground.expect import expect_choice

METHODS = ("zo", "lora", "full")
EXPERT_ADAPTERS = ("each", "shared", "used", "none")
DTYPES = ("auto", "bfloat16", "float16", "float32")
RATES = {"zo": 1e-6, "lora": 2e-4, "full": 1e-5}
"""Learning rates where none is given: MeZO's for large models (arXiv:2305.17333, appendix), LoRA's and AdamW's usual
ones for fine-tuning. None was tuned here."""
HARMLESS = ("steps", "checkpoint_every", "activation_bytes")
"""Settings that may differ when a run is continued. More steps change the schedule of the rate only after a warm-up
with `decay`; that is refused."""


@dataclass(frozen=True, kw_only=True)
class TuneOptions:
    """Settings of a run.

    Args:
        method: `"zo"`, `"lora"` or `"full"`.
        steps: optimiser steps, at least 1.
        sequence_length: S, tokens of a packed row, at least 2.
        batch_size: rows of a micro-batch.
        accumulation: micro-batches of a step; a layer's experts are read once for all of them.
        processes: that share the passes of a step (`zo`); equally many for each.
        learning_rate: of the first step after the warm-up; None takes the method's (RATES).
        warmup_steps: steps in which the rate rises linearly.
        decay: whether the rate falls linearly to 0 from the warm-up to `steps`.
        weight_decay: decoupled, of AdamW; matrices only.
        beta1, beta2: decay rates of AdamW's moments, in [0, 1).
        state_bits: of one number of experts' moments, 32 or 8 (`full`); 8 is not exact.
        clip_norm: largest norm of the gradient of all parameters together; 0 does not clip.
        seed: of the order of rows, of perturbations and of new adapters.
        checkpoint_every: steps between two commits; a killed run continues after the last one.
        activation_bytes: of what autograd keeps between two experts modules, in memory; the rest is spilled to the
            disk (`lora`, `full`), or computed again. None keeps all in memory.
        activation_bits: of one number of activations of decoder layers that are kept or spilled: 8, which is not
            exact; None stores them as they are.
        dtype: of the running model; `"auto"` is that of the checkpoint.
        epsilon: size of a perturbation (`zo`).
        rank: of adapters (`lora`).
        alpha: adapters are scaled by `alpha / rank`.
        targets: names of linear layers to adapt, as PEFT matches them; `"all-linear"` takes all outside experts.
        experts: adapters of experts: one for each, one shared by a layer, one for each of the most used, or none.
        usage: a routing trace of the model, which says what `used` experts are.
        expert_share: of a layer's experts that count as used, in (0, 1].
        adapt_routers: whether routers whose weight is a plain matrix get adapters.

    Raises:
        ValueError: if one is unknown or out of range.
    """

    method: str
    steps: int
    sequence_length: int = 512
    batch_size: int = 1
    accumulation: int = 1
    processes: int = 1
    learning_rate: float | None = None
    warmup_steps: int = 0
    decay: bool = False
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    state_bits: int = 32
    clip_norm: float = 1.0
    seed: int = 0
    checkpoint_every: int = 50
    activation_bytes: int | None = None
    activation_bits: int | None = None
    dtype: str = "auto"
    epsilon: float = 1e-3
    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("all-linear",)
    experts: str = "each"
    usage: str | None = None
    expert_share: float = 0.25
    adapt_routers: bool = False

    def __post_init__(self) -> None:
        expect_choice(self.method, METHODS, "method")
        expect_choice(self.experts, EXPERT_ADAPTERS, "experts")
        expect_choice(self.dtype, DTYPES, "dtype")
        self._expect_ranges()
        if (self.experts == "used") != (self.usage is not None):
            raise ValueError(
                "experts used and a usage trace come together; record one with `expertier trace record MODEL`"
            )
        if self.state_bits != 32 and self.method != "full":
            raise ValueError(f"state_bits are of method full, whose moments are on disk; {self.method} has none there")
        keeps_activations = self.activation_bytes is None and self.activation_bits is None
        if not keeps_activations and self.method == "zo":
            raise ValueError(
                "activation_bytes and activation_bits are of methods with a backward pass; zo keeps those of one layer"
            )
        if self.processes > 1 and self.method != "zo":
            raise ValueError(f"method {self.method} runs in one process; several share the passes of zo")
        if self.passes % self.processes:
            raise ValueError(
                f"{self.processes} processes cannot share out {self.passes} passes, two for each of accumulation "
                f"{self.accumulation}; take numbers that divide"
            )

    def _expect_ranges(self) -> None:
        if self.state_bits not in (8, 32):
            raise ValueError(f"state_bits must be 8 or 32; got {self.state_bits}")
        if self.activation_bits not in (None, 8):
            raise ValueError(f"activation_bits must be 8, or left out; got {self.activation_bits}")
        ones = ("steps", "batch_size", "accumulation", "processes", "checkpoint_every", "rank")
        least = dict.fromkeys(ones, 1) | {"sequence_length": 2, "warmup_steps": 0, "seed": 0}
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise ValueError(f"{name} must be at least {smallest}; got {getattr(self, name)}")
        for name in ("weight_decay", "clip_norm"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be 0 or more; got {getattr(self, name)}")
        for name, value in (("learning_rate", self.rate), ("epsilon", self.epsilon), ("alpha", self.alpha)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be more than 0; got {value}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1); got {getattr(self, name)}")
        if self.activation_bytes is not None and self.activation_bytes < 0:
            raise ValueError(f"activation_bytes must be 0 or more; got {self.activation_bytes}")
        if not 0 < self.expert_share <= 1:
            raise ValueError(f"expert_share must lie in (0, 1]; got {self.expert_share}")

    @property
    def passes(self) -> int:
        """Passes of a step in all processes: one for each micro-batch, `zo` has two."""
        return self.accumulation * (2 if self.method == "zo" else 1)

    @property
    def own_passes(self) -> int:
        """Passes of a step in each process."""
        return self.passes // self.processes

    @property
    def rate(self) -> float:
        """The learning rate, the method's own where none is given."""
        return RATES[self.method] if self.learning_rate is None else self.learning_rate

    def rate_at(self, step: int) -> float:
        """The learning rate of a step, the first of which is 1."""
        if step <= self.warmup_steps:
            return self.rate * step / self.warmup_steps
        left = self.steps - self.warmup_steps
        return self.rate * (1 - (step - 1 - self.warmup_steps) / left) if self.decay else self.rate

    @property
    def rows_per_step(self) -> int:
        """Packed rows of one optimiser step."""
        return self.batch_size * self.accumulation

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"learning_rate": self.rate, "targets": list(self.targets)}

    def expect_continues(self, begun: dict[str, Any]) -> None:
        """Refuse to continue a run that was begun with other settings.

        Raises:
            ValueError: naming the first setting that differs.
        """
        for name, value in self.as_json().items():
            is_free = name in HARMLESS and not (name == "steps" and self.decay)
            if not is_free and begun.get(name) != value:
                raise ValueError(
                    f"the run was begun with {name} {begun.get(name)}; got {value}; "
                    "give the same settings, or another --out"
                )
