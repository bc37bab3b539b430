"""What answers took, as the OpenAI interface counts it."""

from collections.abc import Sequence
from typing import Any

from ..answers import Ended


def usage_of(ended: Sequence[Ended], prompts: int = 1) -> dict[str, Any]:
    """Tokens of a request with one or more answers.

    Args:
        ended: how each answer ended, in any order.
        prompts: different prompts among them; several answers to one prompt count it once.
    """
    if not ended:
        return {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
    per_prompt = max(len(ended) // prompts, 1)
    prompt = sum(end.usage.prompt_tokens for end in ended) // per_prompt
    cached = sum(end.usage.cached_tokens for end in ended) // per_prompt
    completion = sum(end.usage.completion_tokens for end in ended)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {"reasoning_tokens": sum(end.reasoning_tokens for end in ended)},
    }
