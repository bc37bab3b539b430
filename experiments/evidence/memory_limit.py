"""Run a program in a memory control group of its own: page cache counts too, so that every contestant has the same."""

import contextlib
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Finished:
    """What a program did: exit code, output, the most memory its group had (None without a group)."""

    returncode: int
    stdout: str
    stderr: str
    peak_bytes: int | None


def run_limited(command: Sequence[str], limit_bytes: int | None, timeout_s: float) -> Finished:
    """Run `command` with at most `limit_bytes` of memory, anonymous and page cache together.

    Raises:
        ValueError: if no memory control group can be made here and a limit was asked for.
    """
    with _group(limit_bytes) as group:

        def join() -> None:
            if group is not None:
                (group / "cgroup.procs").write_text(str(os.getpid()))

        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, preexec_fn=join, check=False)
        return Finished(done.returncode, done.stdout, done.stderr, _peak(group))


@contextlib.contextmanager
def _group(limit_bytes: int | None) -> Iterator[Path | None]:
    if limit_bytes is None:
        yield None
        return
    parent, limit_name = _own_group()
    try:
        group = Path(tempfile.mkdtemp(prefix=f"expertier-bench-{os.getpid()}-", dir=parent))
        (group / limit_name).write_text(str(limit_bytes))
    except OSError as error:
        raise ValueError(
            f"cannot make a memory control group in {parent} ({error}); run as root, or use none"
        ) from error
    try:
        yield group
    finally:
        for _ in range(50):
            try:
                group.rmdir()
                break
            except OSError:
                time.sleep(0.1)


def _own_group() -> tuple[Path, str]:
    for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            return ROOT / "memory" / path.lstrip("/"), "memory.limit_in_bytes"
    for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
        if line.startswith("0::"):
            return ROOT / line[3:].lstrip("/"), "memory.max"
    raise ValueError("this system has no memory control groups")


def _peak(group: Path | None) -> int | None:
    if group is None:
        return None
    for name in ("memory.max_usage_in_bytes", "memory.peak"):
        if (group / name).is_file():
            return int((group / name).read_text())
    return None


def drop_cached(folder: Path) -> None:
    """Ask the kernel to forget the cached pages of the files in `folder`."""
    for file in folder.iterdir():
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)
