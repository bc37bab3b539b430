"""`expertier train`; what needs torch is imported when it runs."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from routing.ground.expect import expect_not_an_input

from .distributed.launch import (
    expect_launchable,
    is_leader,
    is_resumed,
    is_worker,
    launch,
    shared_out,
    started_processes,
)
from .fitting import fitting_model
from .interrupt import hint_when_interrupted
from .options import DataOption, StepsOption, TokenizerOption
from .presets import PRESETS, TrainConfig, preset, with_steps
from .run_folder import backend_of, expect_same_settings, expect_startable, saved_config, saved_origin
from .text.documents import expect_data
from .text.tokens import expect_tokenizer

if TYPE_CHECKING:
    from .corpus import Corpus

DEFAULT_PRESET = "demo"
PresetOption = Annotated[
    str | None, typer.Option("--preset", help=f"One of {', '.join(PRESETS)}; default: {DEFAULT_PRESET}.")
]
RouterOption = Annotated[
    str | None, typer.Option(help="A router, or a variant of `compare`; default: from the preset.")
]
ResumeOption = Annotated[
    bool, typer.Option("--resume", help="Continue the run in --out; other options are not needed.")
]
ProcessesOption = Annotated[
    int | None, typer.Option(min=1, help="torch: processes of this machine; several machines: docs/distributed.md.")
]
ParallelOption = Annotated[
    str | None, typer.Option(help="torch: processes per axis, such as data=2,expert=2; default: data only.")
]
RestartsOption = Annotated[
    int, typer.Option(min=0, help="With --processes: start all again so often after one failed, from the last save.")
]
BackendOption = Annotated[Literal["torch", "jax"] | None, typer.Option(help="Backend: torch or jax; default: torch.")]


def train(
    out: Annotated[Path, typer.Option(help="Folder of the run.")],
    preset_name: PresetOption = None,
    router: RouterOption = None,
    data: DataOption = None,
    column: Annotated[str | None, typer.Option(help="Text column of a table; default: text.")] = None,
    tokenizer: TokenizerOption = None,
    steps: StepsOption = None,
    seed: Annotated[int | None, typer.Option(help="Of initialisation and data order; default: 0.")] = None,
    resume: ResumeOption = False,
    backend: BackendOption = None,
    mesh: Annotated[str | None, typer.Option(help="jax: devices per axis, such as data=2,expert=4.")] = None,
    processes: ProcessesOption = None,
    parallel: ParallelOption = None,
    max_restarts: RestartsOption = 0,
) -> None:
    """Train a small mixture-of-experts model; safe to kill, `--resume` continues bit by bit.

    Example: `expertier train --preset smoke --out runs/smoke`

    On two processes: `expertier train --preset smoke --processes 2 --parallel expert=2 --out runs/smoke`
    """
    resume = is_resumed(out, asked=resume)
    asked = Asked(preset=preset_name, router=router, steps=steps, seed=seed)
    text = {"data": data, "column": column, "tokenizer": tokenizer}
    found = expect_startable(out, resume=resume)
    if found:
        text = {name: value or saved_origin(out).get(name) for name, value in text.items()}
        backend = _expect_backend(backend, backend_of(found[-1]), out)
    expect_data(text["data"])
    expect_tokenizer(text["tokenizer"])
    if mesh is not None and backend != "jax":
        raise ValueError("--mesh is for --backend jax")
    config = asked.continued(out, saved_config(found[-1])) if found else asked.config()
    workers = started_processes() if is_worker() else processes or 1
    if workers > 1 or parallel is not None:
        if backend == "jax":
            raise ValueError("--processes and --parallel are for --backend torch; jax has --mesh")
        config = config if found else shared_out(config, workers)
        expect_launchable(config, parallel, workers)
        if not is_worker():
            raise typer.Exit(launch(sys.argv[1:], workers, restarts=max_restarts))
    run = _backend(backend, mesh, parallel)

    inputs = [Path(source) for source in (text["data"], text["tokenizer"]) if source and source != "stdlib"]
    expect_not_an_input(out, *inputs)
    from .corpus import load_corpus

    with hint_when_interrupted(f"{out} keeps what was done; expertier train --resume --out {out} continues"):
        corpus = load_corpus(text["data"], column=text["column"] or "text", tokenizer=text["tokenizer"])
        if is_leader():
            _describe(corpus)
        result = run(config, corpus, out, resume=resume)
    if result is None:  # a process that only followed
        return
    typer.echo(
        f"{out}: {result.steps} steps, {result.held_out_bits_per_byte:.3f} bits per byte on held-out text, "
        f"{result.tokens_per_second:.0f} tokens/s"
    )


def _describe(corpus: "Corpus") -> None:
    typer.echo(f"text: {corpus.source}: {corpus.summary}", err=True)
    if corpus.end_token is None:
        typer.echo("the tokenizer has no end token, so nothing marks where a document ends", err=True)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the user said about a run; None where nothing was said.

    Args:
        preset, router: names.
        steps: optimiser steps, 1 or more.
        seed: of initialisation and data order.
    """

    preset: str | None
    router: str | None
    steps: int | None
    seed: int | None

    def config(self) -> TrainConfig:
        """A new run. Raises ValueError if a name is unknown or the router does not fit the preset."""
        config = replace(preset(self.preset or DEFAULT_PRESET), seed=self.seed or 0)
        config = config if self.steps is None else with_steps(config, self.steps)
        return config if self.router is None else replace(config, model=fitting_model(self.router, config.model))

    def continued(self, run: Path, begun: TrainConfig) -> TrainConfig:
        """The run as it was begun. Raises ValueError if what was said contradicts it."""
        wanted = begun
        if self.preset is not None:
            wanted = with_steps(replace(preset(self.preset), seed=begun.seed), begun.steps)
            wanted = replace(wanted, model=self._model(begun.model, [wanted.model]))
        elif self.router is not None:
            wanted = replace(begun, model=self._model(begun.model, [PRESETS[name]().model for name in PRESETS]))
        wanted = replace(
            wanted,
            steps=begun.steps if self.steps is None else self.steps,
            seed=begun.seed if self.seed is None else self.seed,
        )
        if wanted.batch_size * wanted.accumulation == begun.batch_size * begun.accumulation:
            # how a step is cut into micro-batches may come from the number of processes that it began on
            wanted = replace(wanted, batch_size=begun.batch_size, accumulation=begun.accumulation)
        expect_same_settings(run, begun, wanted)
        return begun

    def _model(self, begun: dict[str, Any], bases: list[dict[str, Any]]) -> dict[str, Any]:
        """The model's settings of the run if they can be what was said, of one of these presets; else what was said."""
        if self.router is None:
            return begun if begun["hidden_size"] == bases[0]["hidden_size"] else bases[0]
        from ..variants.catalogue import expect_variant, model_overrides

        expect_variant(self.router)
        for base in bases:
            try:
                found = json.loads(json.dumps(model_overrides(self.router, base)))
            except ValueError:  # it does not fit that preset, so the run is of another one
                continue
            if found == begun:
                return begun
        return model_overrides(self.router, bases[0] if len(bases) == 1 else begun)


def _expect_backend(asked: str | None, begun: str, run: Path) -> str:
    if asked not in (None, begun):
        raise ValueError(f"{run} was trained by {begun}, not by {asked}; leave --backend out, or use another --out")
    return begun


def _backend(name: str | None, mesh: str | None, parallel: str | None) -> Callable[..., Any]:
    if is_worker():
        from .distributed.run import train as train_distributed

        return partial(train_distributed, parallel=parallel)
    if name == "jax":
        from .jax_run import train as train_jax

        return partial(train_jax, mesh=mesh)
    from .torch_run import train as train_torch

    return train_torch
