"""Checkpoint folders that conversions start from: transformers' own classes, never code that lies in the folder."""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PlainCopy = Callable[[Path, Path], object]
"""(GGUF file, folder) -> writes the checkpoint that the file stands for."""

_joined: list[PlainCopy] = []


def read_config(folder: Path) -> Any:
    """The config that transformers makes of a checkpoint folder.

    Args:
        folder: holds `config.json`.

    Raises:
        ValueError: if there is none, it cannot be read, or its model is Python code in the folder.
    """
    from transformers import AutoConfig

    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder} is no checkpoint folder: it has no config.json")
    try:
        described = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: not JSON ({error}); copy it again") from error
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # each config class checks its own fields, and raises what it likes
        if isinstance(described, dict) and "auto_map" in described:
            raise ValueError(
                f"{folder}: model type {described.get('model_type')!r} is Python code in the folder, which is never run"
            ) from error
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(f"{file} cannot be read: {reason[:300]}") from error


def load_model(folder: Path, **options: Any) -> Any:
    """The causal language model of a checkpoint folder, in eval mode.

    Args:
        folder: a checkpoint folder.
        options: of `from_pretrained`, such as `dtype`.

    Raises:
        ValueError: as `read_config`.
    """
    from transformers import AutoModelForCausalLM

    config = read_config(folder)
    return AutoModelForCausalLM.from_pretrained(folder, config=config, trust_remote_code=False, **options).eval()


def join_plain_copy(write: PlainCopy) -> None:
    """Tell the commands of this package how a GGUF file becomes a checkpoint folder; the package cannot read one."""
    _joined[:] = [write]


@contextmanager
def plain_folder(model: Path, beside: Path) -> Iterator[Path]:
    """The checkpoint folder itself, or, inside, a plain copy of a GGUF file that is removed at the end.

    Args:
        model: a checkpoint folder or a GGUF file.
        beside: the copy lies in this path's folder; one that a killed process left there is removed first.

    Raises:
        ValueError: if nobody said how such a file is read.
    """
    if model.suffix != ".gguf" or model.is_dir():
        yield model
        return
    if not _joined:
        raise ValueError(f"{model}: GGUF files are read by the command `expertier` only; pass its plain copy")
    parent, prefix = beside.absolute().parent, f".{beside.name}.plain-"
    for left in parent.glob(f"{prefix}*"):
        shutil.rmtree(left)
    with tempfile.TemporaryDirectory(dir=parent, prefix=prefix) as place:
        copy = Path(place) / "plain"
        _joined[0](model, copy)
        yield copy
