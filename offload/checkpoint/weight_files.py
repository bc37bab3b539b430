"""Which files of a folder hold the weights: those that transformers would read. Without torch."""

import json
from pathlib import Path, PurePosixPath

ONLY_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"


def weights_name(folder: Path) -> str:
    """Which file of a folder is the checkpoint: one file wins over an index, as in transformers.

    Raises:
        ValueError: if there is none, or config.json names a file outside.
    """
    try:
        named = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("transformers_weights")
    except (OSError, ValueError, AttributeError):
        named = None
    if isinstance(named, str):
        if not _is_inside(named) or not named.endswith((".safetensors", ".safetensors.index.json")):
            raise ValueError(
                f"{folder}: config.json names {named!r} as its weights, which is no safetensors file there"
            )
        return named
    for name in (ONLY_NAME, INDEX_NAME):
        if (folder / name).is_file():
            return name
    raise ValueError(
        f"checkpoint {folder}: found neither {INDEX_NAME} nor {ONLY_NAME}; "
        "convert the checkpoint to safetensors (save_pretrained does)"
    )


def weight_map_of(index: Path) -> dict[str, str]:
    """Tensor name -> shard, from an index.

    Raises:
        ValueError: if the index is missing or damaged, or a name leads out of the folder.
    """
    if not index.is_file():
        raise ValueError(f"{index}: no such file")
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        pairs = {str(name): str(file_name) for name, file_name in weight_map.items()}
    except (OSError, KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ValueError(f"{index}: not a safetensors index: {error}") from error
    for file_name in set(pairs.values()):
        if not _is_inside(file_name):
            raise ValueError(f"{index}: shard name {file_name!r} must be a plain file name, or lead into a subfolder")
    return pairs


def _is_inside(name: str) -> bool:
    """Whether a relative name stays below the folder it is relative to."""
    path = PurePosixPath(name)
    return bool(path.name) and not path.is_absolute() and ".." not in path.parts and "\\" not in name


def index_bytes(folder: Path) -> int | None:
    """Bytes of all weights, as the index in `folder` says; None if it does not."""
    try:
        total = json.loads((folder / INDEX_NAME).read_text(encoding="utf-8"))["metadata"]["total_size"]
        return int(total)
    except (OSError, KeyError, TypeError, ValueError):
        return None


def shard_names(folder: Path) -> list[str]:
    """The files that the index in `folder` names, sorted.

    Raises:
        ValueError: if the index is damaged, or a name leads out of the folder.
    """
    return sorted(set(weight_map_of(folder / INDEX_NAME).values()))
