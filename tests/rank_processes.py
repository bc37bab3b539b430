"""Start several processes that run one file together; for tests whose processes exchange something."""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
LIMIT_S = 600
"""A launch takes some ten seconds, on a busy machine minutes; a collective that one process never enters never ends."""


def run_ranks(count: int, module: str, *arguments: str, limit_s: float = LIMIT_S) -> dict[str, Any]:
    """Run `tests/<module>.py` in so many processes; returns what process 0 found, or fails with what all of them said.

    When one fails, the others are ended: they would wait in a collective for it.
    """
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        processes = [_start(place, rank, count, module, arguments) for rank in range(count)]
        deadline = time.monotonic() + limit_s
        try:
            while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
                if any(process.poll() for process in processes):
                    time.sleep(1)  # the others may have something to say about it
                    break
                time.sleep(0.05)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        codes = [process.returncode for process in processes]
        said = "\n".join(f"--- process {rank}\n{(place / f'{rank}.txt').read_text()}" for rank in range(count))
        assert not any(codes), f"exit codes {codes} after {limit_s} s at most\n{said}"
        return json.loads((place / "found.json").read_text())


def _start(place: Path, rank: int, count: int, module: str, arguments: tuple[str, ...]) -> subprocess.Popen[bytes]:
    environment = os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",  # read by libraries that find a group already; nothing listens there
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "RANKS_FOLDER": str(place),
    }
    with (place / f"{rank}.txt").open("wb") as said:
        return subprocess.Popen(
            [sys.executable, "-m", f"tests.{module}", *arguments], env=environment, stdout=said, stderr=said, cwd=place
        )
