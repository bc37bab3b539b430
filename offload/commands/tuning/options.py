"""The options of `expertier finetune`."""

from dataclasses import dataclass
from typing import Annotated, Any

import typer

from routing.ground.quantity import parse_size

from ...finetune.options import DTYPES, EXPERT_ADAPTERS, METHODS, TuneOptions
from ..options import CacheExperts, CpuMemory

OF_THE_COMMAND = ("cpu_memory", "cache_experts", "targets", "activation_memory")
"""Flags that TuneOptions lacks, or has in another form."""


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions:
    """The settings of a run and its memory as flags; the fields of TuneOptions keep their names.

    Raises:
        ValueError: if one is unknown or out of range, or memory is given twice.
    """

    method: Annotated[
        str, typer.Option("--method", help=f"{', '.join(METHODS)}: which one when is in docs/finetune.md.")
    ]
    steps: Annotated[int, typer.Option("--steps", min=1, help="Optimiser steps of the whole run.")]
    cpu_memory: CpuMemory = "auto"
    cache_experts: CacheExperts = None
    sequence_length: Annotated[
        int, typer.Option("--sequence-length", min=2, help="Tokens of a row, which is packed with whole examples.")
    ] = 512
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Rows of a micro-batch.")] = 1
    accumulation: Annotated[
        int,
        typer.Option("--accumulation", min=1, help="Micro-batches per step; experts are read once for all of them."),
    ] = 1
    processes: Annotated[
        int,
        typer.Option("--processes", min=1, help="zo: processes that share a step; --cpu-memory is that of each one."),
    ] = 1
    learning_rate: Annotated[
        float | None, typer.Option("--learning-rate", help="Default: 1e-6 for zo, 2e-4 for lora, 1e-5 for full.")
    ] = None
    warmup_steps: Annotated[int, typer.Option("--warmup-steps", min=0, help="Steps in which the rate rises.")] = 0
    decay: Annotated[bool, typer.Option("--decay", help="Let the rate fall to 0 at the last step.")] = False
    weight_decay: Annotated[float, typer.Option("--weight-decay", min=0, help="Of AdamW, on matrices.")] = 0.0
    state_bits: Annotated[
        int, typer.Option("--state-bits", help="full: 32; or 8, not exact: half the bytes of an expert's record.")
    ] = 32
    clip_norm: Annotated[
        float, typer.Option("--clip-norm", min=0, help="Largest norm of a step's gradient; 0 does not clip.")
    ] = 1.0
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the order of rows and everything random.")] = 0
    checkpoint_every: Annotated[
        int, typer.Option("--checkpoint-every", min=1, help="Steps between commits; a killed run goes on after one.")
    ] = 50
    activation_memory: Annotated[
        str | None,
        typer.Option(
            "--activation-memory",
            help="lora, full: a share of memory such as 2GiB; the rest is spilled or computed again, the same bits.",
        ),
    ] = None
    activation_bits: Annotated[
        int | None, typer.Option("--activation-bits", help="lora, full: 8 stores activations in float8; not exact.")
    ] = None
    dtype: Annotated[str, typer.Option("--dtype", help=f"Of the running model: {', '.join(DTYPES)}.")] = "auto"
    epsilon: Annotated[float, typer.Option("--epsilon", help="zo: size of a perturbation.")] = 1e-3
    rank: Annotated[int, typer.Option("--rank", min=1, help="lora: rank of each adapter.")] = 8
    alpha: Annotated[float, typer.Option("--alpha", help="lora: adapters are scaled by alpha / rank.")] = 16.0
    targets: Annotated[
        str, typer.Option("--targets", help="lora: linear layers to adapt, such as q_proj,v_proj; none, or all-linear.")
    ] = "all-linear"
    experts: Annotated[
        str, typer.Option("--experts", help=f"lora: adapters of experts: {', '.join(EXPERT_ADAPTERS)}.")
    ] = "each"
    usage: Annotated[str | None, typer.Option("--usage", help="lora: a trace of the model, for --experts used.")] = None
    expert_share: Annotated[
        float, typer.Option("--expert-share", help="lora: of each layer's experts, the most used ones of --usage.")
    ] = 0.25
    adapt_routers: Annotated[bool, typer.Option("--adapt-routers", help="lora: adapt routers, too.")] = False

    def __post_init__(self) -> None:
        if self.cpu_memory != "auto":
            parse_size(self.cpu_memory)
            if self.cache_experts is not None:
                raise ValueError("--cpu-memory and --cache-experts both say how many experts stay in memory; give one")
        self.for_run()

    def for_run(self) -> TuneOptions:
        """The settings that the run keeps."""
        own: dict[str, Any] = {name: value for name, value in vars(self).items() if name not in OF_THE_COMMAND}
        if self.activation_memory is not None:
            own["activation_bytes"] = parse_size(self.activation_memory)
        targets = () if self.targets == "none" else tuple(name.strip() for name in self.targets.split(","))
        return TuneOptions(**own, targets=targets)
