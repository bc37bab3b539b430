"""A resident model whose bits an offloaded one can be held against."""

from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoModelForCausalLM

import moe  # noqa: F401 - makes transformers know our models


def load_resident(folder: Path, **options: Any) -> nn.Module:
    """A checkpoint by transformers, its weights moved from where the file was mapped to memory of their own.

    MKL's products of a single float32 row depend on the address of the weight on some processors (AMD's); a mapped
    file has tensors at any multiple of their elements' size, slots have them where memory is allocated.

    Args:
        folder: a checkpoint of a family that transformers knows, or of ours.
        options: passed on to `from_pretrained`, for instance `dtype`.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return model
