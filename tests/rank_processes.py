"""Start several processes that run one file together; for tests whose processes exchange something.

Run as a module, it imports that file and forks them, so that what they all import is read once.
"""

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
NEW_NETWORK = ("unshare", *(("--map-root-user",) if os.geteuid() else ()), "--net")
"""Before a command that has a network of its own."""
LIMIT_S = 600
"""A launch takes some ten seconds, on a busy machine minutes; a collective that one process never enters never ends."""


def run_ranks(count: int, module: str, *arguments: str, limit_s: float = LIMIT_S) -> dict[str, Any]:
    """Run `tests/<module>.py` in so many processes; returns what process 0 found, or fails with what all of them said.

    When one fails, the others are ended: they would wait in a collective for it.
    """
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        starter = _start(place, count, module, arguments)
        with suppress(subprocess.TimeoutExpired):
            starter.wait(limit_s)
        with suppress(ProcessLookupError):  # all have ended
            os.killpg(starter.pid, signal.SIGKILL)
        code = starter.wait()
        said = "\n".join(f"--- {file.stem}\n{file.read_text()}" for file in sorted(place.glob("*.txt")))
        assert code == 0, f"exit code {code} after {limit_s} s at most\n{said}"
        return json.loads((place / "found.json").read_text())


def may_make_namespaces() -> bool:
    """Whether this machine gives a process a network namespace of its own, with the tools to join it to others."""
    if not all(shutil.which(tool) for tool in ("unshare", "ip", "tc")):
        return False
    return subprocess.run([*NEW_NETWORK, "true"], capture_output=True).returncode == 0


def _start(place: Path, count: int, module: str, arguments: tuple[str, ...]) -> subprocess.Popen[bytes]:
    environment = os.environ | {
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",  # read by libraries that find a group already; nothing listens there
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "RANKS_FOLDER": str(place),
    }
    command = [sys.executable, "-m", "tests.rank_processes", f"tests.{module}", *arguments]
    with (place / "starter.txt").open("wb") as said:
        return subprocess.Popen(command, env=environment, stdout=said, stderr=said, cwd=place, start_new_session=True)


def _forked(rank: int, work: Any) -> int:
    if child := os.fork():
        return child
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    said = os.open(f"process {rank}.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(said, sys.stdout.fileno())
    os.dup2(said, sys.stderr.fileno())
    work()
    sys.exit()


def _main(module: str, *arguments: str) -> None:
    work = importlib.import_module(module).main
    sys.argv = [module, *arguments]
    for rank in range(int(os.environ["WORLD_SIZE"])):
        _forked(rank, work)
    for _ in range(int(os.environ["WORLD_SIZE"])):
        if code := os.waitstatus_to_exitcode(os.wait()[1]):
            time.sleep(1)  # the others may have something to say about it
            sys.exit(f"a process ended with {code}")


if __name__ == "__main__":
    _main(*sys.argv[1:])
