"""Where the demo may write; asked before anything heavy is imported."""

from pathlib import Path


def expect_free(out: Path) -> None:
    """Raises ValueError if a folder is in use, or is a file."""
    if out.is_file():
        raise ValueError(f"{out} is a file; the demo needs a folder, choose another --out")
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty; choose another --out")
