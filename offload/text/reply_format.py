"""How a model marks reasoning and calls of tools in its answers, found out from its chat template."""

from dataclasses import dataclass

from .channels import Channels, MarkedChannels, Region
from .harmony import HarmonyChannels

THINK = Region(channel="reasoning", opening="<think>", closing="</think>")
MISTRAL_THINK = Region(channel="reasoning", opening="[THINK]", closing="[/THINK]")
TOOL_CALL = Region(channel="call", opening="<tool_call>", closing="</tool_call>")
MISTRAL_CALL = Region(channel="call", opening="[TOOL_CALLS]", closing="")
LLAMA_CALL = Region(channel="call", opening="<|python_tag|>", closing="")
REGIONS = (THINK, MISTRAL_THINK, TOOL_CALL, MISTRAL_CALL, LLAMA_CALL)
HARMONY_MARKS = ("<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|return|>", "<|call|>", "<|constrain|>")
HARMONY_ANSWER = "<|channel|>final<|message|>"


@dataclass(frozen=True, kw_only=True)
class ReplyFormat:
    """The marks in a model's answers.

    Args:
        regions: stretches that the model marks; empty if all that it writes is content.
        is_harmony: whether answers are messages with headers, as those of gpt-oss.
    """

    regions: tuple[Region, ...] = ()
    is_harmony: bool = False

    @property
    def marks(self) -> frozenset[str]:
        """Texts of tokens that mean something here, although a tokenizer may count them as control tokens."""
        if self.is_harmony:
            return frozenset(HARMONY_MARKS)
        return frozenset(mark for region in self.regions for mark in (region.opening, region.closing) if mark)

    @property
    def has_reasoning(self) -> bool:
        return self.is_harmony or any(region.channel == "reasoning" for region in self.regions)

    @property
    def has_calls(self) -> bool:
        return self.is_harmony or any(region.channel == "call" for region in self.regions)

    def opened_by(self, prompt: str) -> Region | None:
        """The reasoning that the end of a prompt opens: some templates write `<think>` themselves."""
        end = prompt.rstrip()
        reasoning = (region for region in self.regions if region.channel == "reasoning")
        return next((region for region in reasoning if end.endswith(region.opening)), None)

    def channels(self, prompt: str, *, is_calling: bool) -> Channels:
        """A splitter for one answer.

        Args:
            prompt: the end of the rendered prompt, at least its last line.
            is_calling: whether the request has tools that may be called; else calls stay in the text.
        """
        if self.is_harmony:
            return HarmonyChannels(is_calling=is_calling)
        regions = [region for region in self.regions if is_calling or region.channel != "call"]
        return MarkedChannels(regions, self.opened_by(prompt))

    def answer_begins(self, prompt: str) -> str:
        """The mark after which the answer proper begins, for a grammar to wait for; empty if it begins at once."""
        if self.is_harmony:
            return HARMONY_ANSWER
        region = self.opened_by(prompt)
        return "" if region is None else region.closing


def format_of(template: str) -> ReplyFormat:
    """The format that a chat template reads when it renders earlier answers, hence the one that its model writes."""
    if all(mark in template for mark in ("<|channel|>", "<|message|>")):
        return ReplyFormat(is_harmony=True)
    return ReplyFormat(regions=tuple(region for region in REGIONS if region.opening in template))
