"""What answers took, as the OpenAI interface counts it."""

from collections.abc import Sequence
from typing import Any

from ...engine.events import Reads
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


def timings_of(ended: Sequence[Ended]) -> dict[str, Any]:
    """Speed of answers in the words of llama-server, and what was read from files meanwhile.

    Args:
        ended: how each answer ended; their times are added.
    """
    usages = [end.usage for end in ended]
    cached = sum(usage.cached_tokens for usage in usages)
    read = sum(usage.prompt_tokens for usage in usages) - cached
    generated = sum(usage.completion_tokens for usage in usages)
    prefill_s, decode_s = sum(usage.prefill_s for usage in usages), sum(usage.decode_s for usage in usages)
    reads = sum((usage.reads for usage in usages), Reads())
    asked = reads.hits + reads.misses
    return {
        "cache_n": cached,
        "prompt_n": read,
        "prompt_ms": 1000 * prefill_s,
        "prompt_per_second": read / prefill_s if prefill_s else None,
        "predicted_n": generated,
        "predicted_ms": 1000 * decode_s,
        "predicted_per_second": generated / decode_s if decode_s else None,
        "offload": {"hit_rate": reads.hits / asked if asked else None, "bytes_read": reads.nbytes},
    }
