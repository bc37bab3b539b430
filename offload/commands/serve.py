"""`expertier serve`: answer over HTTP as OpenAI and Anthropic do."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from routing.ground.terminal import plain_console

from .options import Model, expect_model, quiet_transformers, with_options
from .serve_options import ServeOptions

if TYPE_CHECKING:
    from ..serve.opening import Opened
    from ..serve.web.guard import Gate
    from ..serve.web.service import Service

WATCH_S = 0.5
"""Seconds between looks at the engine's thread."""
LAST_LOOK_S = 2.0
"""Seconds in which a failed server still says why to those who ask, before it ends."""


@with_options(ServeOptions)
def serve(
    model: Model,
    host: Annotated[str, typer.Option("--host", help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="Port to listen at; 0 takes a free one.")
    ] = 8080,
    grace: Annotated[
        float, typer.Option("--grace", min=0, help="Seconds that running answers have after Ctrl-C or SIGTERM.")
    ] = 30.0,
    *,
    options: ServeOptions,
) -> None:
    """Answer chat, text and tool requests over HTTP, as OpenAI and Anthropic do, for one or several users.

    Clients need `http://127.0.0.1:8080/v1` as base URL and any key. `http://127.0.0.1:8080/` shows how it goes.
    Others in the network are answered only with `--host 0.0.0.0 --api-key-file FILE`.

    Example: `expertier serve my-model --cpu-memory 6GiB --name my-model`
    """
    expect_model(model)
    from ..serve.web.app import make_app
    from ..serve.web.guard import expect_safe
    from ..serve.web.lifetime import Lifetime, address_of, listen
    from ..serve.web.metrics import Metrics
    from ..serve.web.service import Service

    gate, template = _gate(host, options), options.template
    expect_safe(host, gate, is_insecure=options.insecure)
    names = tuple(options.name or [Path(model).resolve().name if Path(model).is_dir() else model])
    service = Service(names=names, metrics=Metrics(names[0]), is_any_name=options.any_model)
    with listen(host, port) as listening:
        console = plain_console(stderr=True, soft_wrap=True)
        console.print(f"{address_of(listening)}/v1 listens; loading {model}")
        lifetime = Lifetime(make_app(service, gate), service, grace)
        opened: list[Opened] = []
        try:
            lifetime.run_with(listening, lambda: _load_and_watch(model, template, service, options, opened))
        finally:
            for one in opened:
                one.engine.close(grace_s=0)
    console.print("the server has ended")


def _gate(host: str, options: ServeOptions) -> "Gate":
    from ..serve.web.guard import Gate, as_origins, read_keys

    keys = () if options.api_key_file is None else read_keys(options.api_key_file)
    own = (options.key_of_environment,) if options.key_of_environment else ()
    hosts = tuple(name.lower() for name in (host, *(options.allow_host or ())))
    return Gate(keys=(*keys, *own), hosts=hosts, origins=as_origins(options.cors or ()))


def _load_and_watch(
    model: str, template: str | None, service: "Service", options: ServeOptions, opened: "list[Opened]"
) -> None:
    """Get the model ready, then wait for the engine's end; runs in a thread of its own."""
    from ..checkpoint.location import local_folder, local_name

    service.stage = "starting"
    from ..serve.grammars import Grammars
    from ..serve.opening import open_answering, open_conversations
    from ..serve.web.answering import Desk

    quiet_transformers()
    service.stage = f"downloading {model}" if local_name(model) is None else "reading weights"
    folder = local_folder(model)
    conversations = open_conversations(folder, template)
    service.stage = "reading weights"
    found = open_answering(folder, conversations, options.for_engine, options.for_loading, context=options.context)
    opened.append(found)
    service.defaults, service.created_s, service.budget = found.defaults, int(time.time()), found.budget
    service.counters, service.arithmetic = found.engine.counters, found.engine.model_info.arithmetic
    service.metrics.watch(found.engine.counters, found.budget)
    service.desk = Desk(found.engine, found.asker, Grammars(found.asker.vocabulary), service.metrics)
    console = plain_console(stderr=True, soft_wrap=True)
    if found.note:
        console.print(found.note)
    console.print(f"ready: {service.names[0]}, {found.asker.context} tokens per request")
    while found.engine.state == "ready":
        time.sleep(WATCH_S)
    if found.engine.state == "failed":
        service.failure = found.engine.failure
        time.sleep(LAST_LOOK_S)
        raise RuntimeError(service.failure)
