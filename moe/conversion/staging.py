"""A checkpoint folder that appears whole or not at all, whatever kills the process that writes it."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

UNFINISHED = "unfinished-"


@contextmanager
def staged_folder(out: Path) -> Iterator[Path]:
    """An empty folder beside `out`, which takes its name at the end; on an error it is removed.

    What a killed process left half written under the same name is removed first.

    Args:
        out: the finished folder; must not exist yet.
    """
    prefix = f".{out.name}.{UNFINISHED}"
    for left in out.absolute().parent.glob(f"{prefix}*"):
        shutil.rmtree(left)
    with tempfile.TemporaryDirectory(dir=out.absolute().parent, prefix=prefix) as staging:
        unfinished = Path(staging) / "checkpoint"
        unfinished.mkdir()
        yield unfinished
        unfinished.rename(out)
