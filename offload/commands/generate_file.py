"""`expertier generate --prompts`: answers to a file of prompts, in one run or several."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from routing.ground.quantity import format_size
from routing.ground.terminal import plain_console

from ..text.conversation import Conversations, read_template
from .generate_options import GenerateOptions
from .options import quiet_transformers

if TYPE_CHECKING:
    from ..serve.choosing import Choice
    from ..serve.prompt_file import PromptLine
    from ..serve.text import ModelText


class Prompts:
    """Token ids of what a user wrote, as raw text or by the model's chat template.

    Args:
        folder: of the model, or its GGUF file.
        text: encodes raw text.
        options: say whether a text is a user's message, and what stands before it.
    """

    def __init__(self, folder: Path, text: "ModelText", options: GenerateOptions) -> None:
        self._folder, self._text, self._options = folder, text, options
        self._conversations: Conversations | None = None

    def ids(self, prompt: str | Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids of a text, or of the messages of a conversation.

        Raises:
            ValueError: if there is none, or the template refuses the messages.
        """
        if isinstance(prompt, str) and not self._options.chat:
            return self._text.encode_prompt(prompt)
        system = self._options.system
        before = [] if system is None else [{"role": "system", "content": system}]
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return self._opened().render([*before, *messages])

    def _opened(self) -> Conversations:
        from ..serve.opening import open_conversations

        if self._conversations is None:
            file = self._options.chat_template
            self._conversations = open_conversations(self._folder, None if file is None else read_template(file))
        return self._conversations


def answer_file(
    model: str, prompts: Path, out: Path | None, max_new_tokens: int, options: GenerateOptions, batch_size: int
) -> None:
    """Answer the prompts of a file that have no answer yet.

    Args:
        model: folder or model id.
        prompts: JSON lines with `prompt` or `messages`.
        out: JSON lines of answers; those that are there already stay.
        max_new_tokens: most tokens of an answer whose prompt does not say.
        options: of loading and choosing.
        batch_size: prompts that are answered together; those that are foreseen to use the same experts, if more than 1.

    Raises:
        ValueError: if there is no `out`, or a file has a wrong line.
    """
    if out is None:
        raise ValueError("--prompts needs --out FILE for the answers")
    from ..serve.prompt_file import AnswerFile, read_prompts

    asked = read_prompts(prompts)
    answers = AnswerFile(out, asked)
    left = [prompt for prompt in asked if prompt.line not in answers.done]
    console = plain_console(stderr=True, soft_wrap=True)
    if answers.done:
        console.print(f"{len(answers.done)} of {len(asked)} prompts have an answer in {out}")
    if not left:
        return
    from rich.progress import Progress

    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(f"loading {model}", total=None)
        found = _answers(model, left, max_new_tokens, options, batch_size, console.print)
        for done, (prompt, answer) in enumerate(found, 1):
            answers.append(prompt, answer)
            progress.update(task, total=len(left), completed=done, description="answering")
    console.print(f"{len(left)} answers added to {out}")


def _answers(
    model: str,
    asked: "Sequence[PromptLine]",
    max_new_tokens: int,
    options: GenerateOptions,
    batch_size: int,
    say: Callable[[str], None],
) -> "Iterator[tuple[PromptLine, dict[str, Any]]]":
    """Pairs of prompt and answer, one after the other, or batch by batch."""
    from ..checkpoint.location import local_folder
    from ..runtime.loading import load
    from ..serve.generation import generate_text
    from ..serve.text import expect_room, open_text

    quiet_transformers()
    folder = local_folder(model)
    text = open_text(folder)
    prompts = Prompts(folder, text, options)
    ready = [(prompt, prompts.ids(prompt.prompt), prompt.max_new_tokens or max_new_tokens) for prompt in asked]
    for _, ids, count in ready:  # before the model is read: the last prompt shall not end a night's work
        expect_room(len(ids), count, options.context)
    if batch_size > 1:
        yield from _together(folder, text, ready, options, batch_size, say)
        return
    loaded = load(folder, **options.for_loading)
    for prompt, ids, count in ready:
        choice = _choice_of(prompt, options)
        found = generate_text(loaded, text, ids, max_new_tokens=count, show=lambda piece: None, choice=choice)
        yield prompt, {name: found[name] for name in ("text", "finish_reason", "prompt_tokens", "token_ids")}


def _together(
    folder: Path,
    text: "ModelText",
    ready: "Sequence[tuple[PromptLine, list[int], int]]",
    options: GenerateOptions,
    batch_size: int,
    say: Callable[[str], None],
) -> "Iterator[tuple[PromptLine, dict[str, Any]]]":
    """Pairs of prompt and answer, by batches that are foreseen to use the same experts; says what came of it."""
    from ..runtime.loading import load
    from ..serve.batch_answers import Asked, answer_batches, form
    from ..serve.opening import arithmetic_for_many

    room = {"arithmetic": arithmetic_for_many(options.arithmetic), "context": batch_size * options.context}
    loaded = load(folder, **options.for_loading | room)
    formed = form(loaded, [ids for _, ids, _ in ready], batch_size)
    say(str(formed))
    asked = [
        Asked(prompt_ids=tuple(ids), max_new_tokens=count, choice=_choice_of(prompt, options))
        for prompt, ids, count in ready
    ]
    for place, answer in answer_batches(loaded, text, asked, formed.batches):
        yield ready[place][0], answer
    report = loaded.offload.report()
    read = format_size(report["bytes_read"])
    say(f"{report['misses']} experts and {read} were read, hit rate {report['hit_rate']:.3f}")


def _choice_of(prompt: "PromptLine", options: GenerateOptions) -> "Choice":
    """How the tokens of one answer are chosen."""
    choice = options.choice
    if prompt.seed is None:
        return choice
    return replace(choice, sampling=replace(choice.sampling, seed=prompt.seed))
