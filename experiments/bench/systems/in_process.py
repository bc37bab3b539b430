"""A measurement in a process of its own, in a memory control group where a limit is given."""

import importlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from ...evidence.memory_limit import run_limited

TEMPORARY = Path(tempfile.gettempdir())
"""Where files go for a while that need no disk of their own."""
TIMEOUT_S = 600.0
"""Of one measurement; those of the default sizes take a minute or two."""


def measured(module: str, limit_bytes: int | None = None, **given: Any) -> dict[str, Any]:
    """What `measure` of a module beside this one gives in a new process, and `peak_bytes` of its group.

    Args:
        module: its name.
        limit_bytes: of anonymous memory and page cache together; None sets no limit, and `peak_bytes` is None.
        given: arguments of `measure`, JSON-serialisable.

    Raises:
        RuntimeError: if the process fails; the message is its last line.
    """
    done = run_limited([sys.executable, "-m", __name__, module, json.dumps(given)], limit_bytes, TIMEOUT_S)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
        raise RuntimeError(f"the measurement failed: {last}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return {**found, "peak_bytes": done.peak_bytes}


if __name__ == "__main__":
    name, arguments = sys.argv[1:]
    measure = importlib.import_module(f".{name}", __package__).measure
    print(json.dumps(measure(**json.loads(arguments))))
