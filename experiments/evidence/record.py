"""Records: what was run, on what, and what came out, kept beside the code so that every quoted number has a source."""

import csv
import json
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RECORDS = Path(__file__).parent.parent / "records"
PACKAGES = ("expertier", "numpy", "torch", "transformers", "triton", "jax", "pulp", "highspy")


def save_record(
    slug: str,
    rows: Sequence[Mapping[str, Any]],
    *,
    config: Mapping[str, Any],
    seed: int | None = None,
    folder: Path = RECORDS,
) -> Path:
    """Write `<folder>/<date>_<slug>/record.json` and `result.csv`; a person adds the README.md beside them.

    Args:
        slug: what was asked, in a few words joined by dashes.
        rows: the results, one mapping per line of the table, all with the same keys.
        config: every setting that the result depends on, JSON-serialisable.
        seed: the seed, if there was one.
        folder: where records live.

    Returns:
        The folder of this record; a record of the same day and slug is replaced.
    """
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
    (target / "record.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    with (target / "result.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return target


def _commit() -> dict[str, Any]:
    def git(*arguments: str) -> str | None:
        done = subprocess.run(["git", *arguments], cwd=RECORDS.parent, capture_output=True, text=True, check=False)
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
