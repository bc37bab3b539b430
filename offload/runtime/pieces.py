"""Long prompts in pieces: how many tokens at once, and who computes them so."""

from typing import Any

from .activations import prefill_tokens


def piece_tokens(model: Any, context: int) -> int:
    """Tokens of a prompt that `generate` computes at once.

    Args:
        model: of transformers, loaded or without weights.
        context: tokens of the longest prompt.

    Returns:
        `context`, or fewer if a layer would hold too much; never fewer for classes whose cache is their own, which
        transformers cannot fill piece by piece.
    """
    if not model._supports_default_dynamic_cache():
        return context
    return prefill_tokens(model.config, context)


def read_prompts_in_pieces(model: Any, context: int) -> None:
    """Tell `generate` how much of a prompt to compute at once, where the whole would take too much.

    Without a cache there is nothing that pieces could be added to; `generate` then refuses in one line.
    """
    settings, tokens = model.generation_config, piece_tokens(model, context)
    if tokens >= context or settings is None or settings.prefill_chunk_size is not None:
        return
    settings.prefill_chunk_size = tokens
    generate = model.generate

    def generate_with_cache(*args: Any, **kwargs: Any) -> Any:
        asked = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None) or settings
        if kwargs.get("use_cache", asked.use_cache) is False:
            raise ValueError(
                f"use_cache=False computes whole texts at once, and with context={context} memory is kept for "
                f"{tokens} tokens at once; leave the cache on, or load the model with a smaller context"
            )
        return generate(*args, **kwargs)

    model.generate = generate_with_cache
