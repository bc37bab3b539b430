"""The files of a tokenizer, read as data: no code beside them is run, and what is wrong is said in one line."""

import json
from pathlib import Path
from typing import Any

MAX_SETTINGS_BYTES = 64 << 20
"""Of `tokenizer_config.json`. Those with every added token written out have a few MB."""


def open_tokenizer(folder: Path) -> Any:
    """The tokenizer that transformers makes of a folder.

    Args:
        folder: holds the files that a tokenizer's `save_pretrained` writes.

    Returns:
        A tokenizer of transformers.

    Raises:
        ValueError: if the tokenizer is Python code in the folder, or its files cannot be read.
    """
    from transformers import AutoTokenizer

    expect_no_code(folder)
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # tokenizers raises bare Exception, and its files raise whatever they contain
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(
            f"{folder}: its tokenizer cannot be read ({type(error).__name__}: {reason[:200]}); "
            "copy the tokenizer's files again from where the model came from"
        ) from error


def expect_no_code(folder: Path) -> None:
    """Refuse a tokenizer that is a program: transformers would ask at the terminal whether to run it.

    Raises:
        ValueError: if only the folder's own code could read its tokenizer, or the settings are no JSON.
    """
    file = folder / "tokenizer_config.json"
    if not file.is_file():
        return
    try:
        if file.stat().st_size > MAX_SETTINGS_BYTES:
            raise ValueError(f"{file.stat().st_size} bytes")
        settings: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: not JSON ({error}); copy it again") from error
    auto_map = settings.get("auto_map") if isinstance(settings, dict) else None
    if auto_map and not (folder / "tokenizer.json").is_file():
        raise ValueError(
            f"{folder}: its tokenizer is Python code in the folder, which is never run; "
            "put a tokenizer.json there (a fast tokenizer's save_pretrained writes one)"
        )
