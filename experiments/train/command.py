"""`expertier train`; what needs torch is imported when it runs."""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from routing.ground.expect import expect_not_an_input

from .description.continuing import continued
from .description.description import DEFAULT_PRESET, described
from .distributed.launch import (
    expect_launchable,
    is_leader,
    is_resumed,
    is_worker,
    launch,
    shared_out,
    started_processes,
)
from .interrupt import hint_when_interrupted
from .options import ColumnOption, ConfigOption, DataOption, SetOption, StepsOption, TokenizerOption
from .presets import PRESETS
from .run_folder import expect_startable
from .watching.page import PAGE
from .watching.watch import Watch

if TYPE_CHECKING:
    from .corpus import Corpus

PresetOption = Annotated[
    str | None, typer.Option("--preset", help=f"One of {', '.join(PRESETS)}; default: {DEFAULT_PRESET}.")
]
RouterOption = Annotated[
    str | None, typer.Option(help="A router, or a variant of `compare`; default: from the preset.")
]
FromOption = Annotated[
    Path | None, typer.Option("--from", help="Checkpoint to start from: ours, or a family of transformers.")
]
ParamsOption = Annotated[str | None, typer.Option(help="Parameters to solve a shape for, such as 5M.")]
ActiveOption = Annotated[str | None, typer.Option(help="With --params: parameters that a token visits, such as 1M.")]
ResumeOption = Annotated[
    bool, typer.Option("--resume", help="Continue the run in --out; other options are not needed.")
]
ProcessesOption = Annotated[
    int | None, typer.Option(min=1, help="torch: processes of this machine; several machines: docs/distributed.md.")
]
ParallelOption = Annotated[
    str | None,
    typer.Option(help="torch: processes per axis, such as data=2,expert=2; auto goes by time; default: data only."),
]
RestartsOption = Annotated[
    int, typer.Option(min=0, help="With --processes: start all again so often after one failed, from the last save.")
]
LiveOption = Annotated[bool, typer.Option("--live", help="Curves in the terminal instead of a progress bar.")]
EventFilesOption = Annotated[
    bool, typer.Option("--tensorboard", help="Also write TensorBoard's files, into the folder of the run.")
]
BackendOption = Annotated[Literal["torch", "jax"] | None, typer.Option(help="Backend: torch or jax; default: torch.")]


def train(
    out: Annotated[Path, typer.Option(help="Folder of the run.")],
    config_file: ConfigOption = None,
    settings: SetOption = None,
    preset_name: PresetOption = None,
    router: RouterOption = None,
    start_from: FromOption = None,
    params: ParamsOption = None,
    active: ActiveOption = None,
    data: DataOption = None,
    column: ColumnOption = None,
    tokenizer: TokenizerOption = None,
    steps: StepsOption = None,
    seed: Annotated[int | None, typer.Option(help="Of initialisation and data order; default: 0.")] = None,
    resume: ResumeOption = False,
    backend: BackendOption = None,
    mesh: Annotated[str | None, typer.Option(help="jax: devices per axis, such as data=2,expert=4.")] = None,
    processes: ProcessesOption = None,
    parallel: ParallelOption = None,
    max_restarts: RestartsOption = 0,
    live: LiveOption = False,
    event_files: EventFilesOption = False,
) -> None:
    """Train a small mixture-of-experts model; safe to kill, `--resume` continues bit by bit.

    Example: `expertier train --preset smoke --out runs/smoke`

    From a file: `expertier train --config run.yaml --set model.num_experts=64 --set learning_rate=2e-3 --out new`

    On two processes: `expertier train --preset smoke --processes 2 --parallel expert=2 --out runs/smoke`
    """
    resume = is_resumed(out, asked=resume)
    options = {
        "preset": preset_name,
        "router": router,
        "start_from": None if start_from is None else str(start_from.absolute()),
        "params": params,
        "active": active,
        "steps": steps,
        "seed": seed,
        "data": data,
        "column": column,
        "tokenizer": tokenizer,
        "backend": backend,
        "mesh": mesh,
    }
    found = expect_startable(out, resume=resume)
    if found:
        run = continued(out, found[-1], config_file, settings or [], options)
    else:
        run = described(config_file, settings or [], options)
    config, text = run.config, run.text
    text.expect_there()
    if event_files:
        import tensorboard  # noqa: F401  (a missing package is said before anything is read)
    workers = started_processes() if is_worker() else processes or 1
    if workers > 1 or parallel is not None:
        if config.backend == "jax":
            raise ValueError("--processes and --parallel are for --backend torch; jax has --mesh")
        config = config if found else shared_out(config, workers)
        expect_launchable(config, parallel, workers)
        if not is_worker():
            raise typer.Exit(launch(sys.argv[1:], workers, restarts=max_restarts))
    start = _backend(config.backend, parallel)
    watch = Watch(live=live, page=True, event_files=event_files)

    inputs = (text.data, text.tokenizer, config.start_from)
    expect_not_an_input(out, *(Path(source) for source in inputs if source and source != "stdlib"))
    with hint_when_interrupted(f"{out} keeps what was done; expertier train --resume --out {out} continues"):
        corpus = text.load()
        if is_leader():
            _tell(corpus, run.notes)
        result = start(config, corpus, out, resume=resume, watch=watch)
    if result is None:  # a process that only followed
        return
    typer.echo(
        f"{out}: {result.steps} steps, {result.held_out_bits_per_byte:.3f} bits per byte on held-out text, "
        f"{result.tokens_per_second:.0f} tokens/s"
    )
    if parallel == "auto":
        from .distributed.adapting import taken

        for degree in taken(out):
            typer.echo(f"degree: {degree}", err=True)
    typer.echo(f"page: {(out / PAGE).absolute()}", err=True)


def _tell(corpus: "Corpus", notes: Sequence[str]) -> None:
    """Say what is read, and what was chosen where only a wish was given."""
    for line in (*notes, f"text: {corpus.source}: {corpus.summary}"):
        typer.echo(line, err=True)
    if corpus.end_token is None:
        typer.echo("the tokenizer has no end token, so nothing marks where a document ends", err=True)


def _backend(name: str, parallel: str | None) -> Callable[..., Any]:
    if is_worker():
        from .distributed.run import train as train_distributed

        return partial(train_distributed, parallel=parallel)
    if name == "jax":
        from .jax_run import train as train_jax

        return train_jax
    from .torch_run import train as train_torch

    return train_torch
