"""What configs of model families say under different names. Duck-typed, so that it works without transformers."""

from typing import Any

TOP_K_NAMES = (
    "num_experts_per_tok",
    "moe_topk",
    "moe_top_k",
    "num_selected_experts",
    "top_k_experts",
    "expert_top_k",
    "moe_k",
)


def text_config(config: Any) -> Any:
    """The part of a config that describes the language model; the config itself where there is nothing else."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def experts_per_token(config: Any) -> int:
    """K, the experts that each token visits in a layer; the most, where layers differ.

    Raises:
        ValueError: if the config has none of the names that model families use for it.
    """
    text = text_config(config)
    for name in TOP_K_NAMES:
        value = getattr(text, name, None)
        if isinstance(value, list | tuple) and value:
            value = max(value)
        if isinstance(value, int) and value > 0:
            return value
    raise ValueError(
        f"{type(text).__name__} does not say how many experts a token visits; expected one of {', '.join(TOP_K_NAMES)}"
    )
