"""Options of `expertier generate`: those of loading, and how tokens are chosen."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..engine.request import Sampling
from ..text.conversation import read_template
from .options import LoadOptions

if TYPE_CHECKING:
    from ..serve.choosing import Choice


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(LoadOptions):
    """The options as flags of a command; see LoadOptions."""

    temperature: Annotated[
        float, typer.Option("--temperature", help="0: the likeliest token always. 1: as the model says.")
    ] = 0.0
    top_p: Annotated[float, typer.Option("--top-p", help="Keep the likeliest tokens up to this probability.")] = 1.0
    top_k: Annotated[int, typer.Option("--top-k", help="Keep so many of the likeliest tokens; 0: all.")] = 0
    min_p: Annotated[float, typer.Option("--min-p", help="Drop tokens below this share of the likeliest.")] = 0.0
    repetition_penalty: Annotated[
        float, typer.Option("--repetition-penalty", help="Above 1: what has been said becomes less likely.")
    ] = 1.0
    presence_penalty: Annotated[
        float, typer.Option("--presence-penalty", help="Subtracted from logits of tokens generated before.")
    ] = 0.0
    frequency_penalty: Annotated[
        float, typer.Option("--frequency-penalty", help="Subtracted once for each time a token was generated.")
    ] = 0.0
    seed: Annotated[int | None, typer.Option("--seed", help="Of the random numbers; `serve` gives the same text.")] = (
        None
    )
    skip_ffn: Annotated[
        float | None,
        typer.Option(
            "--skip-ffn",
            help="Lossy: leave out feed-forwards, and the reads of their experts, after one that turned the hidden "
            "state so little (cosine, such as 0.98).",
        ),
    ] = None
    rewire: Annotated[
        int | None,
        typer.Option(
            "--rewire",
            min=1,
            help="LOSSY: every so many tokens, such as 128, fit offsets on router logits to the text so far.",
        ),
    ] = None
    stop: Annotated[
        list[str] | None, typer.Option("--stop", help="End before this text; repeat for more.", show_default=False)
    ] = None
    chat: Annotated[
        bool, typer.Option("--chat", help="The prompt is a user's message; apply the model's chat template.")
    ] = False
    system: Annotated[str | None, typer.Option("--system", help="System message before the prompt, with --chat.")] = (
        None
    )
    chat_template: Annotated[
        Path | None, typer.Option("--chat-template", help="Use this Jinja file instead of the model's template.")
    ] = None

    prefer_cached: Annotated[
        float | None,
        typer.Option("--prefer-cached", help="LOSSY: a bonus for experts in memory, as a share of the logits' range."),
    ] = None

    def __post_init__(self) -> None:
        """Refuse what cannot work, before torch is imported.

        Raises:
            ValueError: as LoadOptions, for numbers out of range, and for options of `--chat` without it.
        """
        super().__post_init__()
        _ = self.sampling
        if self.skip_ffn is not None and not 0 < self.skip_ffn <= 1:
            raise ValueError(f"--skip-ffn is a cosine above 0 and at most 1; got {self.skip_ffn:g}")
        if self.rewire is not None and (self.skip_ffn is not None or self.prefer_cached is not None):
            raise ValueError("--rewire, --skip-ffn and --prefer-cached each make another model; give one of them")
        if "" in (self.stop or ()):
            raise ValueError("--stop is empty; leave it out")
        if not self.chat and (self.system is not None or self.chat_template is not None):
            raise ValueError("--system and --chat-template need --chat")
        if self.prefer_cached is not None and not 0 <= self.prefer_cached <= 1:
            raise ValueError(f"--prefer-cached must lie in 0..1; got {self.prefer_cached}")
        if self.chat_template is not None:
            read_template(self.chat_template)

    @property
    def sampling(self) -> Sampling:
        """How tokens are chosen."""
        return Sampling(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            seed=self.seed,
        )

    @property
    def choice(self) -> "Choice":
        """How tokens are chosen, and what ends the text."""
        from ..serve.choosing import Choice

        return Choice(sampling=self.sampling, stops=tuple(self.stop or ()))
