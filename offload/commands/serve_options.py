"""Options of `expertier serve`: those of loading, and those of a server."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from routing.ground.expect import expect_choice
from routing.ground.quantity import parse_size

from ..engine.options import LOOKUPS, ORDERS, REUSES, SCHEDULES, EngineOptions
from ..text.conversation import read_template
from .options import LoadOptions

KEY_VARIABLE = "EXPERTIER_API_KEY"


@dataclass(frozen=True, kw_only=True)
class ServeOptions(LoadOptions):
    """The options as flags of a command; see LoadOptions."""

    context: Annotated[
        int, typer.Option("--context", min=1, help="Tokens, of all users together, that memory is kept for.")
    ] = 16384
    name: Annotated[
        list[str] | None, typer.Option("--name", help="Name of the model for clients; repeat for aliases.")
    ] = None
    any_model: Annotated[bool, typer.Option("--any-model", help="Answer requests for any model's name.")] = False
    api_key_file: Annotated[
        Path | None, typer.Option("--api-key-file", help=f"Accepted API keys, one a line. Or set {KEY_VARIABLE}.")
    ] = None
    allow_host: Annotated[
        list[str] | None, typer.Option("--allow-host", help="A name of this machine that clients use; repeat for more.")
    ] = None
    cors: Annotated[
        list[str] | None, typer.Option("--cors", help="A web page, as http://host, whose scripts may ask.")
    ] = None
    insecure: Annotated[bool, typer.Option("--insecure", help="Listen to the network without a key.")] = False
    chat_template: Annotated[
        Path | None, typer.Option("--chat-template", help="Use this Jinja file instead of the model's template.")
    ] = None
    parallel: Annotated[int, typer.Option("--parallel", min=1, help="Answers that are generated at the same time.")] = (
        EngineOptions.most_users
    )
    max_queue: Annotated[int, typer.Option("--max-queue", min=0, help="Requests that wait; others get 429.")] = (
        EngineOptions.most_queued
    )
    max_output: Annotated[int, typer.Option("--max-output", min=1, help="Most tokens of one answer.")] = (
        EngineOptions.most_new_tokens
    )
    schedule: Annotated[str, typer.Option("--schedule", help=f"Who is computed next: {', '.join(SCHEDULES)}.")] = "auto"
    longest_wait: Annotated[
        float, typer.Option("--longest-wait", help="Seconds that a user waits for his next tokens at most.")
    ] = EngineOptions.longest_wait_s
    lookup: Annotated[str, typer.Option("--lookup", help=f"Guess tokens from words before: {', '.join(LOOKUPS)}.")] = (
        "auto"
    )
    reuse: Annotated[
        str, typer.Option("--reuse", help=f"What a prompt starts from of read ones: {', '.join(REUSES)}.")
    ] = "auto"
    order: Annotated[str, typer.Option("--order", help=f"Who of those who wait starts next: {', '.join(ORDERS)}.")] = (
        "auto"
    )
    piece_tokens: Annotated[
        int | None, typer.Option("--piece-tokens", min=1, help="Tokens of a prompt that are read at once.")
    ] = None
    time_limit: Annotated[
        float | None,
        typer.Option("--time-limit", help="Seconds that an answer may take, its wait included; none if not given."),
    ] = None
    prompt_cache_folder: Annotated[
        Path | None, typer.Option("--prompt-cache-folder", help="Keep read prompts here over a restart.")
    ] = None
    prompt_cache_disk: Annotated[
        str, typer.Option("--prompt-cache-disk", help="Most bytes in that folder, such as 8GiB.")
    ] = "8GiB"

    def __post_init__(self) -> None:
        """Refuse what cannot work, before torch is imported.

        Raises:
            ValueError: as LoadOptions, and for what the server cannot do.
        """
        super().__post_init__()
        expect_choice(self.schedule, SCHEDULES, "--schedule")
        expect_choice(self.lookup, LOOKUPS, "--lookup")
        expect_choice(self.reuse, REUSES, "--reuse")
        expect_choice(self.order, ORDERS, "--order")
        parse_size(self.prompt_cache_disk)
        if self.time_limit is not None and not self.time_limit > 0:
            raise ValueError(f"--time-limit {self.time_limit:g}: give seconds above 0")
        if self.prompt_cache_folder is not None and not self.prompt_cache_folder.is_dir():
            raise ValueError(f"--prompt-cache-folder {self.prompt_cache_folder}: no such folder; create it first")
        for file, what in ((self.api_key_file, "--api-key-file"), (self.chat_template, "--chat-template")):
            if file is not None and not file.is_file():
                raise ValueError(f"{what} {file}: no such file")

    @property
    def for_engine(self) -> EngineOptions:
        """Limits and choices of the engine."""
        return EngineOptions(
            most_users=self.parallel,
            most_queued=self.max_queue,
            most_new_tokens=self.max_output,
            schedule=self.schedule,  # type: ignore[arg-type]
            longest_wait_s=self.longest_wait,
            lookup=self.lookup,  # type: ignore[arg-type]
            reuse=self.reuse,  # type: ignore[arg-type]
            order=self.order,  # type: ignore[arg-type]
            piece_tokens=self.piece_tokens,
            prefix_folder=self.prompt_cache_folder,
            prefix_disk=self.prompt_cache_disk,
        )

    @property
    def template(self) -> str | None:
        """The Jinja text of `chat_template`, checked."""
        return None if self.chat_template is None else read_template(self.chat_template)

    @property
    def key_of_environment(self) -> str:
        """The API key that the environment names; empty if it names none."""
        return os.environ.get(KEY_VARIABLE, "")
