"""Files that are either the old version or the whole new one, never half of either."""

import json
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


@contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "w", *, is_private: bool = False) -> Iterator[IO[Any]]:
    """Open a temporary file beside `path`; on success it takes the name `path`, on any error it is removed.

    Args:
        path: where the finished file shall be; its folder must exist.
        mode: `"w"` for UTF-8 text, `"wb"` for bytes.
        is_private: only its owner may read it.

    Yields:
        The open temporary file.

    Raises:
        ValueError: if the folder of `path` does not exist.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise ValueError(f"cannot write {target}: the folder {target.parent} does not exist; create it first")
    descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part")
    try:
        with os.fdopen(descriptor, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o600 if is_private else 0o666 & ~_umask())
        os.replace(name, target)
    except BaseException:
        os.unlink(name)
        raise


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as indented JSON, atomically.

    Raises:
        ValueError: if it holds NaN or an infinity, which JSON cannot say; the message names the key.
    """
    if (key := _not_finite(value)) is not None:
        raise ValueError(f"cannot write {path}: {key or 'the value'} is NaN or infinite, which JSON cannot say")
    with atomic_write(path) as file:
        json.dump(value, file, indent=2, allow_nan=False)
        file.write("\n")


def _not_finite(value: Any, key: str = "") -> str | None:
    """The key of the first number that is NaN or infinite, or None."""
    if isinstance(value, float):
        return None if math.isfinite(value) else key
    if isinstance(value, dict):
        entries = [(f"{key}.{name}" if key else str(name), entry) for name, entry in value.items()]
    elif isinstance(value, list | tuple):
        entries = [(f"{key}[{index}]", entry) for index, entry in enumerate(value)]
    else:
        return None
    return next((found for name, entry in entries if (found := _not_finite(entry, name)) is not None), None)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
