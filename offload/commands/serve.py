"""`expertier serve`: answer over HTTP as OpenAI and Anthropic do."""

import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from routing.ground.terminal import plain_console

from .options import expect_model, quiet_transformers, with_options
from .processes import Processes, ProcessesOption, follow, processes_of
from .serve_options import ServeOptions

if TYPE_CHECKING:
    from ..serve.opening import Opened
    from ..serve.web.answering import Desk
    from ..serve.web.guard import Gate
    from ..serve.web.service import Service

WATCH_S = 0.5
"""Seconds between looks at the engine's thread."""
LAST_LOOK_S = 2.0
"""Seconds in which a failed server still says why to those who ask, before it ends."""


@with_options(ServeOptions)
def serve(
    model: Annotated[
        str | None, typer.Argument(help="A Hugging Face model folder (safetensors), or a model id.")
    ] = None,
    members: Annotated[
        Path | None,
        typer.Option("--members", help="Instead of a model: a YAML file of several; each request is for one of them."),
    ] = None,
    host: Annotated[str, typer.Option("--host", help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="Port to listen at; 0 takes a free one.")
    ] = 8080,
    grace: Annotated[
        float, typer.Option("--grace", min=0, help="Seconds that running answers have after Ctrl-C or SIGTERM.")
    ] = 30.0,
    processes: ProcessesOption = None,
    *,
    options: ServeOptions,
) -> None:
    """Answer chat, text and tool requests over HTTP, as OpenAI and Anthropic do, for one or several users.

    Clients need `http://127.0.0.1:8080/v1` as base URL and any key. `http://127.0.0.1:8080/` shows how it goes.
    Others in the network are answered only with `--host 0.0.0.0 --api-key-file FILE`.

    Example: `expertier serve my-model --cpu-memory 6GiB --name my-model`

    Several models in one budget: `expertier serve --members models.yaml --cpu-memory 6GiB`

    On two processes, each with a part of the experts: `expertier serve my-model --processes 2 --cpu-memory 3GiB`
    """
    if (model is None) == (members is None):
        raise ValueError("give either a MODEL or --members FILE")
    if model is not None:
        expect_model(model)
    several = None if processes is None else _several(members, options)
    if several is not None and not several.are_started():
        raise typer.Exit(several.start(processes or 1))
    if several is not None and not several.join():
        follow(several, str(model), options)
        return
    from ..serve.web.app import make_app
    from ..serve.web.guard import expect_safe
    from ..serve.web.lifetime import Lifetime, address_of, listen
    from ..serve.web.metrics import Metrics
    from ..serve.web.service import Service

    gate, template = _gate(host, options), options.template
    expect_safe(host, gate, is_insecure=options.insecure)
    names = _names(model, members, options)
    service = Service(names=names, metrics=Metrics(names[0]), is_any_name=options.any_model)
    with listen(host, port) as listening:
        console = plain_console(stderr=True, soft_wrap=True)
        console.print(f"{address_of(listening)}/v1 listens; loading {model or members}")
        lifetime = Lifetime(make_app(service, gate), service, grace)
        opened: list[Opened] = []
        try:
            load = partial(_load_and_watch, model, members, template, service, options, opened, several)
            lifetime.run_with(listening, load)
        finally:
            for one in opened:
                one.engine.close(grace_s=0)
    console.print("the server has ended")


def _several(members: Path | None, options: ServeOptions) -> Processes:
    """How to run on several processes; `--members` share one."""
    if members is not None:
        raise ValueError("--processes is for one model; leave it out with --members")
    return processes_of(options)


def _names(model: str | None, members: Path | None, options: ServeOptions) -> tuple[str, ...]:
    """Names that requests may use, the first for answers; of members, that of the file leaves the choice to the prompt.

    Raises:
        ValueError: if the file of members is damaged, or an option is for one model.
    """
    if members is None:
        model = str(model)
        return tuple(options.name or [Path(model).resolve().name if Path(model).is_dir() else model])
    if others := [*options.only_for_one_model, *(["any_model"] if options.any_model else [])]:
        raise ValueError(f"--{others[0].replace('_', '-')} is for one model; leave it out with --members")
    from ..members.choosing import Chooser
    from ..members.file import read_members

    described = read_members(members)
    labels = Chooser(described.rules(), described.default).labels
    return (*(options.name or [members.stem]), *labels)


def _gate(host: str, options: ServeOptions) -> "Gate":
    from ..serve.web.guard import Gate, as_origins, read_keys

    keys = () if options.api_key_file is None else read_keys(options.api_key_file)
    own = (options.key_of_environment,) if options.key_of_environment else ()
    hosts = tuple(name.lower() for name in (host, *(options.allow_host or ())))
    return Gate(keys=(*keys, *own), hosts=hosts, origins=as_origins(options.cors or ()))


def _load_and_watch(
    model: str | None,
    members: Path | None,
    template: str | None,
    service: "Service",
    options: ServeOptions,
    opened: "list[Opened]",
    several: Processes | None,
) -> None:
    """Get the model ready, then wait for the engine's end; runs in a thread of its own."""
    service.stage = "starting"
    quiet_transformers()
    if members is None:
        found = _open_one(str(model), template, service, options, opened, several)
    else:
        found = _open_members(members, template, service, options, opened)
    service.defaults, service.created_s, service.budget = found.defaults, int(time.time()), found.budget
    service.counters, service.arithmetic = found.engine.counters, found.engine.model_info.arithmetic
    service.metrics.watch(found.engine.counters, found.budget)
    service.desk = _desk_of(found, service, options)
    console = plain_console(stderr=True, soft_wrap=True)
    if found.note:
        console.print(found.note)
    console.print(f"ready: {service.names[0]}, {found.asker.context} tokens per request")
    while all(one.engine.state == "ready" for one in opened):
        time.sleep(WATCH_S)
    if failed := [one.engine for one in opened if one.engine.state == "failed"]:
        service.failure = failed[0].failure
        time.sleep(LAST_LOOK_S)
        raise RuntimeError(service.failure)


def _open_one(
    model: str,
    template: str | None,
    service: "Service",
    options: ServeOptions,
    opened: "list[Opened]",
    several: Processes | None,
) -> "Opened":
    from ..checkpoint.location import local_folder, local_name
    from ..runtime.loading import load
    from ..serve.opening import open_answering, open_conversations

    service.stage = f"downloading {model}" if local_name(model) is None else "reading weights"
    folder = local_folder(model)
    conversations = open_conversations(folder, template)
    service.stage = "reading weights"
    found = open_answering(
        *(folder, conversations, options.for_engine, options.for_loading),
        context=options.context,
        open_with=load if several is None else several.lead,
    )
    opened.append(found)
    return found


def _open_members(
    members: Path, template: str | None, service: "Service", options: ServeOptions, opened: "list[Opened]"
) -> "Opened":
    """Open an engine for each member; gives the one that answers by default."""
    from ..members.members import load_members
    from ..serve.opening import arithmetic_for_many, open_answering, open_conversations

    shared = {name: getattr(options, name) for name in ("cpu_memory", "context", "io")}
    group = load_members(members, **shared, arithmetic=arithmetic_for_many(options.arithmetic), is_shared=True)
    found = {}
    for name, model in group.models.items():
        folder = Path(group.folders[name])
        service.stage = f"opening {name}"
        conversations = open_conversations(folder, template)
        context = options.context
        found[name] = open_answering(folder, conversations, options.for_engine, {}, context=context, loaded=model)
        opened.append(found[name])
    service.desks = {name: _desk_of(one, service, options) for name, one in found.items()}
    service.route = lambda text, label: group.choose(text, label, is_next=False).name
    return found[group.chooser.default]


def _desk_of(found: "Opened", service: "Service", options: ServeOptions) -> "Desk":
    from ..serve.grammars import Grammars
    from ..serve.web.answering import Desk

    grammars = Grammars(found.asker.vocabulary)
    return Desk(found.engine, found.asker, grammars, service.metrics, options.time_limit)
