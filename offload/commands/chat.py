"""`expertier chat`: talk with a model in the terminal."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from routing.ground.expect import expect_choice, expect_folder
from routing.ground.terminal import plain_console

from .options import LoadOptions, expect_model, quiet_transformers, with_options
from .serve_options import KEY_VARIABLE

if TYPE_CHECKING:
    from ..chat.partners import Partner
    from ..chat.talk import Talk

THINKING = {"on": True, "off": False, "auto": None}


@dataclass(frozen=True, kw_only=True)
class ChatOptions(LoadOptions):
    """The options as flags of a command; see LoadOptions."""

    context: Annotated[
        int, typer.Option("--context", min=1, help="Tokens of the conversation that memory is kept for.")
    ] = 8192
    system: Annotated[str | None, typer.Option("--system", help="System message.")] = None
    temperature: Annotated[
        float | None, typer.Option("--temperature", help="0: the likeliest token always. Default: the model's.")
    ] = None
    seed: Annotated[int | None, typer.Option("--seed", help="Of the random numbers.")] = None
    max_new_tokens: Annotated[int | None, typer.Option("--max-new-tokens", min=1, help="Most tokens of an answer.")] = (
        None
    )
    thinking: Annotated[
        str, typer.Option("--thinking", help=f"Whether the model reasons first: {', '.join(THINKING)}.")
    ] = "auto"
    hide_thinking: Annotated[bool, typer.Option("--hide-thinking", help="Do not show reasoning.")] = False
    session: Annotated[
        Path | None, typer.Option("--session", help="Go on with the conversation in this file, and keep it there.")
    ] = None
    chat_template: Annotated[
        Path | None, typer.Option("--chat-template", help="Use this Jinja file instead of the model's template.")
    ] = None

    def __post_init__(self) -> None:
        """Refuse what cannot work, before torch is imported.

        Raises:
            ValueError: as LoadOptions, and for values out of range.
        """
        super().__post_init__()
        expect_choice(self.thinking, THINKING, "--thinking")
        if self.chat_template is not None and not self.chat_template.is_file():
            raise ValueError(f"--chat-template {self.chat_template}: no such file")
        if self.session is not None:
            expect_folder(self.session)


@with_options(ChatOptions)
def chat(
    model: Annotated[str | None, typer.Argument(help="A model folder or id; with --server its name there.")] = None,
    server: Annotated[
        str | None, typer.Option("--server", help="Talk to this server of the OpenAI interface, as http://host:port.")
    ] = None,
    once: Annotated[
        str | None, typer.Option("--once", help="Answer this on stdout as plain text, and end; - reads it from stdin.")
    ] = None,
    *,
    options: ChatOptions,
) -> None:
    """Talk with a model: its answers as Markdown while they grow, with history, and orders such as /undo and /again.

    Ctrl-C stops an answer and not the program; Ctrl-D ends; /help lists the orders.

    Example: `expertier chat my-model --cpu-memory 6GiB`

    With a server: `expertier chat --server http://127.0.0.1:8080`

    In a pipe: `expertier chat my-model --once "Name three rivers." --temperature 0`
    """
    if (model is None) and server is None:
        raise ValueError("give a model's folder or --server URL")
    if server is None and model is not None:
        expect_model(model)
    from ..chat.session import answer_once, converse

    talk = _talk(options)
    question = _stdin() if once == "-" else once
    if question is not None and not question.strip():
        raise ValueError("--once is empty; say something")
    partner = _partner(model, server, options)
    try:
        if question is not None:
            talk.ask(question)
            answer_once(talk, partner)
        else:
            talk = converse(talk, partner, shows_reasoning=not options.hide_thinking)
        if options.session is not None:
            talk.save(options.session)
    finally:
        partner.close()


def _talk(options: ChatOptions) -> "Talk":
    from ..chat.talk import Talk, load_talk

    is_kept = options.session is not None and options.session.exists()
    talk = load_talk(options.session) if is_kept and options.session is not None else Talk()
    if options.system is not None:
        talk.system = options.system
    for name in ("temperature", "seed", "max_new_tokens"):
        if (value := getattr(options, name)) is not None:
            talk.set(name, str(value))
    if options.thinking != "auto":
        talk.thinking = THINKING[options.thinking]
    return talk


def _partner(model: str | None, server: str | None, options: ChatOptions) -> "Partner":
    from ..chat.partners import LocalPartner, ServerPartner

    if server is not None:
        return ServerPartner(server, model, os.environ.get(KEY_VARIABLE, ""))
    assert model is not None
    with plain_console(stderr=True).status(f"loading {model}"):
        from ..checkpoint.location import local_folder
        from ..engine.options import EngineOptions
        from ..serve.opening import open_answering, open_conversations
        from ..text.conversation import read_template

        quiet_transformers()
        folder = local_folder(model)
        template = None if options.chat_template is None else read_template(options.chat_template)
        engine = EngineOptions(most_users=1, most_queued=1, most_new_tokens=options.context)
        opened = open_answering(
            folder, open_conversations(folder, template), engine, options.for_loading, context=options.context
        )
    if opened.note:
        plain_console(stderr=True, soft_wrap=True).print(opened.note)
    return LocalPartner(opened)


def _stdin() -> str:
    import sys

    data = sys.stdin.buffer.read()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"the question on stdin is not UTF-8 text (byte {error.start})") from error
