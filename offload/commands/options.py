"""Options that several commands share."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from inspect import Parameter, signature
from pathlib import Path
from typing import Annotated, Any

import typer

from routing.ground.expect import expect_name
from routing.ground.quantity import parse_size

from ..cache.catalogue import CACHES, NEEDS_FUTURE
from ..cache.depth import expect_depth
from ..prefetch.prefetch import PREDICTORS

Model = Annotated[str, typer.Argument(help="A Hugging Face model folder (safetensors), or a model id.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Also write the report to this file, as JSON.")]
Hardware = Annotated[
    Path | None, typer.Option("--hardware", help="Rates of this machine from `calibrate`; adds the speed to expect.")
]
CpuMemory = Annotated[
    str,
    typer.Option("--cpu-memory", help="Budget for all RAM of the process, such as 6GiB. auto: 90 % of what is free."),
]
GpuMemory = Annotated[
    str,
    typer.Option("--gpu-memory", help="Budget for everything on the GPU, such as 8GiB. auto: 90 % of what is free."),
]
CacheExperts = Annotated[
    int | None,
    typer.Option("--cache-experts", min=1, help="RAM slots per MoE layer, instead of what the budget pays for."),
]
Context = Annotated[
    int, typer.Option("--context", min=1, help="Tokens, of the prompt and new ones, that memory is kept for.")
]
Arithmetic = Annotated[
    str,
    typer.Option(
        "--arithmetic",
        help="exact: the resident model's bits. fixed: the same bits at every budget, batch and number of threads. "
        "fast: no promise. auto: the first of them that is not slower than the resident model.",
    ),
]
ARITHMETICS = ("auto", "exact", "fixed", "fast")
Pack = Annotated[Path | None, typer.Option("--pack", help="Read experts from this file of `expertier pack`.")]

ResidentLayers = Annotated[
    int | None,
    typer.Option(
        "--resident-layers",
        min=0,
        help="Decoder layers that stay in memory, the head counting as one; others are read for each token. "
        "Default: as many as the budget holds.",
    ),
]
LayersAhead = Annotated[
    int | None,
    typer.Option("--layers-ahead", min=0, help="Layers read while one is computed. Default: up to 2."),
]
Depth = Annotated[
    str,
    typer.Option(
        "--depth",
        help="Levels to read of --pack, if it has levels: a number, all, or auto: what memory holds. While running, "
        "and lossy: weight[:WHOLE,FEW] by routing weight, hottest[:N] for the hottest experts, router by its gates.",
    ),
]


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """The options of `offload.load` as flags of a command: each field is both, under one name."""

    cpu_memory: CpuMemory = "auto"
    cache_experts: CacheExperts = None
    context: Context = 2048
    policy: Annotated[
        str, typer.Option("--policy", help=f"Eviction policy: auto, {', '.join(sorted(CACHES.keys() - NEEDS_FUTURE))}.")
    ] = "auto"
    arithmetic: Arithmetic = "auto"
    io: Annotated[
        str, typer.Option("--io", help="direct: past the page cache. cached: through it. auto: by size and memory.")
    ] = "auto"
    pack: Pack = None
    depth: Depth = "all"
    prefetch: Annotated[
        str, typer.Option("--prefetch", help=f"off, {', '.join(PREDICTORS)}, or a file of `trace predictor`.")
    ] = "auto"
    plan: Annotated[
        Path | None,
        typer.Option("--plan", help="A plan of `place tiers`, or a trace (.npz) to size each layer's cache by."),
    ] = None
    node: Annotated[
        int | None, typer.Option("--node", min=0, help="Which node of a --plan of several this machine is.")
    ] = None
    device: Annotated[str, typer.Option("--device", help="cpu, cuda, or auto: cuda if --gpu-memory names a size.")] = (
        "auto"
    )
    gpu_memory: GpuMemory = "auto"
    peer_memory: Annotated[
        str | None,
        typer.Option("--peer-memory", help="Memory of another GPU for experts that the first gives up, such as 8GiB."),
    ] = None
    resident_layers: ResidentLayers = None
    layers_ahead: LayersAhead = None
    cache_units: Annotated[
        int | None,
        typer.Option(
            "--cache-units",
            min=0,
            help="With --pack of `pack --bundle`: hidden units of each layer that stay in memory.",
        ),
    ] = None

    def __post_init__(self) -> None:
        """Refuse what cannot work, before torch is imported.

        Raises:
            ValueError: for an unknown name, a size without a unit, or options that exclude each other.
        """
        expect_name(self.policy, ["auto", *CACHES.keys() - NEEDS_FUTURE], "cache policy")
        expect_name(self.arithmetic, ARITHMETICS, "arithmetic")
        expect_name(self.io, ("auto", "direct", "cached"), "way of reading")
        expect_name(self.device, ("auto", "cpu", "cuda"), "device")
        for size in (self.cpu_memory, self.gpu_memory):
            if size not in ("auto", "0"):
                parse_size(size)
        if self.peer_memory is not None:
            parse_size(self.peer_memory)
        expect_depth(self.depth)
        if not self.prefetch.endswith(".npz"):
            expect_name(self.prefetch, ("auto", "off", *PREDICTORS), "way of prefetching")
        for what, file in (("plan", self.plan), ("pack", self.pack), ("predictor", self.predictor)):
            if file is not None and not file.is_file():
                raise ValueError(f"{what} {file}: no such file")
        if self.node is not None and self.plan is None:
            raise ValueError("--node chooses a part of a --plan of several nodes; give one")
        if self.plan is not None and self.cache_experts is not None:
            raise ValueError("--plan and --cache-experts both say how many slots a layer has; give one of them")
        if self.device == "cpu" and self.gpu_memory not in ("auto", "0"):
            raise ValueError(f"--device cpu has no GPU memory; leave out --gpu-memory {self.gpu_memory}")

    @property
    def for_loading(self) -> dict[str, Any]:
        """Arguments of `offload.load`; commands with more options subclass this."""
        return {field.name: getattr(self, field.name) for field in fields(LoadOptions)}

    @property
    def only_for_one_model(self) -> list[str]:
        """Options that are given, and are about one model's experts, layers or device."""
        names = ("cache_experts", "policy", "pack", "prefetch", "plan", "device", "gpu_memory", "peer_memory")
        names += ("resident_layers", "layers_ahead", "cache_units", "node")
        return [name for name in names if getattr(self, name) not in (None, "auto")]

    @property
    def predictor(self) -> Path | None:
        """The file that `prefetch` names; None if it names none."""
        return Path(self.prefetch) if self.prefetch.endswith(".npz") else None

    @property
    def files(self) -> tuple[Path | None, ...]:
        """What is read besides the model."""
        return self.pack, self.plan, self.predictor


def with_options(kind: type[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Let a command take a dataclass of options: its fields become flags, its last argument `options` the value.

    Args:
        kind: a dataclass whose fields are annotated as Typer's options are.
    """

    def wrap(command: Callable[..., None]) -> Callable[..., None]:
        own = [parameter for parameter in signature(command).parameters.values() if parameter.name != "options"]
        added = [
            Parameter(field.name, Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type)
            for field in fields(kind)
        ]

        @wraps(command)
        def call(**given: Any) -> None:
            options = kind(**{field.name: given.pop(field.name) for field in fields(kind)})
            command(**given, options=options)

        keyword = [parameter.replace(kind=Parameter.KEYWORD_ONLY) for parameter in own]
        call.__signature__ = signature(command).replace(parameters=[*keyword, *added])  # type: ignore[attr-defined]
        call.__annotations__ = {parameter.name: parameter.annotation for parameter in (*keyword, *added)}
        return call

    return wrap


def expect_model(model: str) -> None:
    """Refuse a model that is neither a folder nor the id of one, before torch is imported.

    Raises:
        ValueError: if there is no such folder and the name is no `owner/name`.
    """
    from ..checkpoint.location import local_name

    local_name(model)


def quiet_transformers() -> None:
    """Silence transformers' warnings and progress bars: the command prints its own."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
