"""The PyPI package `gguf`, imported when a GGUF file is opened: names, block sizes and the definition of each type."""

from typing import Any


def gguf_library() -> Any:
    """The package.

    Raises:
        ValueError: if it is not installed; the message says how to install it.
    """
    try:
        import gguf
    except ImportError as error:
        raise ValueError(f"GGUF files need the package gguf ({error}); install it with: pip install gguf") from error
    return gguf
