"""How the converter of llama.cpp changes a model's tensors, by architecture; what is not known here is refused.

A GGUF file does not say that rows were moved or that 1 was added to norms, and a wrong guess gives wrong numbers
without an error. transformers undoes the changes of some architectures; the others of this table are renamed only.

Source: `modify_tensors` of each class in llama.cpp's convert_hf_to_gguf.py.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from routing.ground.expect import expect_name

Change = Callable[[np.ndarray, str], np.ndarray]
"""(values as the file has them, GGUF name) -> values as the model has them."""

UNDONE_BY_TRANSFORMERS = ("llama", "qwen2moe", "qwen3moe", "gemma2", "gemma3", "nemotron", "minimax-m2")
RENAMED_ONLY = ("qwen2", "qwen3", "olmoe", "glm4moe", "gpt-oss")
ARCHITECTURES = (*UNDONE_BY_TRANSFORMERS, *RENAMED_ONLY)
MODEL_TYPES = {
    "qwen2moe": "qwen2_moe",
    "qwen3moe": "qwen3_moe",
    "minimax-m2": "minimax_m2",
    "gpt-oss": "gpt_oss",
    "gemma3": "gemma3_text",
}
"""What transformers calls an architecture, where the names differ."""


def expect_architecture(file: Any, name: str) -> None:
    """Refuse an architecture whose changes are not known.

    Raises:
        ValueError: with the known ones.
    """
    try:
        expect_name(name, ARCHITECTURES, "GGUF architecture")
    except ValueError as error:
        raise ValueError(
            f"{file}: {error}; what llama.cpp's converter does to the weights of others is not known here, "
            "so use the model's safetensors files"
        ) from error


def change_of(architecture: str, config: Any) -> Change:
    """What makes the model's values of a tensor from those of the file.

    Args:
        architecture: name in ARCHITECTURES.
        config: the model's, for the numbers of heads.
    """
    if architecture in RENAMED_ONLY:
        return lambda values, name: values
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS

    processor = TENSOR_PROCESSORS[architecture](config=config.to_dict())

    def change(values: np.ndarray, name: str) -> np.ndarray:
        changed: np.ndarray = processor.process(values, name).weights
        return changed

    return change
