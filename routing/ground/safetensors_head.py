"""The head of a safetensors file: where each tensor lies, as JSON before the bytes of the tensors.

Source: the format's description in the repository huggingface/safetensors.
"""

import json
from collections.abc import Iterable

ALIGNMENT_BYTES = 8
"""Of the first tensor in a safetensors file, as its own writer aligns it."""


def safetensors_head(tensors: Iterable[tuple[str, str, tuple[int, ...], int]]) -> bytes:
    """What stands before the tensors of a file that holds them one after the other.

    Args:
        tensors: name, dtype as the format calls it (`BF16`), shape, and size in bytes of each.
    """
    described: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, dtype, shape, nbytes in tensors:
        described[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, begin + nbytes]}
        begin += nbytes
    text = json.dumps(described, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // ALIGNMENT_BYTES) * ALIGNMENT_BYTES)
    return len(text).to_bytes(8, "little") + text
