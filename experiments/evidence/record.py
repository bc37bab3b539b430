"""Records: what was run, on which machine, and what came out. Every quoted number has one, beside the code.

A record is a folder `experiments/records/<date>_<slug>/` with three files:

- `record.json`: command, configuration, seed, date, commit, versions and device;
- `result.csv`: the numbers, one line per case, with all digits;
- `README.md`: question, expectation, result, conclusion, and what would change our mind. A person writes it.

Markers in the pages of `docs/` point to columns of `result.csv`; `tests/test_figures.py` compares both.
"""

import csv
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from routing.ground.files import atomic_write, write_json

RECORDS = Path(__file__).parent.parent / "records"
PACKAGES = ("expertier", "numpy", "torch", "transformers", "triton", "jax", "pulp", "highspy")


def expect_records(folder: Path) -> None:
    """Refuse a folder in which no record can be made, before anything is measured; one that is missing is made later.

    Raises:
        ValueError: if it, or what it would lie in, is a file or read-only.
    """
    found = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    if not found.is_dir():
        raise ValueError(f"cannot keep records in {folder}: {found} is a file; give a folder")
    if not os.access(found, os.W_OK):
        raise ValueError(f"cannot keep records in {folder}: {found} is read-only")


def save_record(
    slug: str,
    rows: Sequence[Mapping[str, Any]],
    *,
    config: Mapping[str, Any],
    seed: int | None = None,
    folder: Path = RECORDS,
) -> Path:
    """Write `<folder>/<today>_<slug>/record.json` and `result.csv`, each whole or not at all.

    A record of the same day and slug is overwritten; its `README.md` stays and has to be checked by hand.

    Args:
        slug: the question in a few words joined by dashes, such as `router-overhead`.
        rows: one mapping per line of the table, at least one; the keys of the first are the columns of all.
        config: every setting that the result depends on besides the command line; JSON-serialisable.
        seed: seed of the run; None if nothing was drawn at random.
        folder: where the record's folder is made.

    Returns:
        The record's folder.

    Raises:
        ValueError: if there are no rows, or a row has a key that the first one lacks.
    """
    if not rows:
        raise ValueError(f"record {slug}: expected at least one row of results, got none; nothing was written")
    target = folder / f"{date.today().isoformat()}_{slug}"
    target.mkdir(parents=True, exist_ok=True)
    facts = {
        "command": ["expertier", *sys.argv[1:]],
        "config": dict(config),
        "seed": seed,
        "date": date.today().isoformat(),
        **_commit(),
        "versions": versions(),
        "device": device(),
    }
    with atomic_write(target / "result.csv") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    write_json(target / "record.json", facts)
    return target


def _commit() -> dict[str, Any]:
    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=RECORDS.parent, capture_output=True, text=True, check=False)
        except FileNotFoundError:  # sources that were copied to a machine without git
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}


def versions() -> dict[str, str]:
    """Versions of Python and of the packages here that a result depends on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def device() -> dict[str, Any]:
    """The machine: `cpu` and `system` names, and what torch uses once it is imported."""
    found: dict[str, Any] = {"cpu": _cpu_name(), "system": platform.platform()}
    if "torch" in sys.modules:
        torch = sys.modules["torch"]
        found["cpu_threads"] = torch.get_num_threads()
        if torch.cuda.is_available():
            found["gpu"] = torch.cuda.get_device_name()
    return found


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
