"""Control groups: what the kernel will let this process and its neighbours in a group have. Without torch."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT, PROCESS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
UNLIMITED = 1 << 60
"""Version 1 writes a number near 2^63 where there is no limit."""


@dataclass(frozen=True)
class GroupFiles:
    """Names of one version's files: limits, what the group holds, and which part of that is file cache."""

    limits: tuple[str, ...]
    usage: str
    cache: tuple[str, ...]


# "cache" and "file" would count shared memory (tmpfs, `/dev/shm`) too, which the kernel cannot give up
VERSION_1 = GroupFiles(
    ("memory.limit_in_bytes",), "memory.usage_in_bytes", ("total_active_file", "total_inactive_file")
)
VERSION_2 = GroupFiles(("memory.max", "memory.high"), "memory.current", ("active_file", "inactive_file"))


def cgroup_limit(root: Path = ROOT, process: Path = PROCESS) -> int | None:
    """The smallest memory limit of this process's control groups (v1 and v2), in bytes; None without one."""
    found = [limit for folder, files in _groups(root, process) if (limit := _limit(folder, files)) is not None]
    return min(found) if found else None


def cgroup_room(own_bytes: int, root: Path = ROOT, process: Path = PROCESS) -> int | None:
    """Bytes that this process may have in total beside its neighbours in its control groups; None without a limit.

    File cache does not count as used, since the kernel gives it up before it kills; shared memory counts.

    Args:
        own_bytes: what this process has of it now.
        root: where control groups are mounted.
        process: the file that names this process's groups.
    """
    rooms = []
    for folder, files in _groups(root, process):
        if (limit := _limit(folder, files)) is not None:
            held = max(_number(folder / files.usage) - _cache(folder, files), 0)
            rooms.append(limit - max(held - own_bytes, 0))
    return max(min(rooms), 0) if rooms else None


def _groups(root: Path, process: Path) -> Iterator[tuple[Path, GroupFiles]]:
    """The folders of this process's memory groups, from its own up to the root."""
    try:
        lines = process.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0":
            yield from ((folder, VERSION_2) for base in (root, root / "unified") for folder in _upwards(base, path))
        elif "memory" in controllers.split(","):
            yield from ((folder, VERSION_1) for folder in _upwards(root / "memory", path))


def _upwards(base: Path, path: str) -> Iterator[Path]:
    folder = base / path.lstrip("/")
    yield folder
    while folder != base and base in folder.parents:
        folder = folder.parent
        yield folder


def _limit(folder: Path, files: GroupFiles) -> int | None:
    found = [number for name in files.limits if 0 < (number := _number(folder / name)) < UNLIMITED]
    return min(found) if found else None


def _cache(folder: Path, files: GroupFiles) -> int:
    try:
        lines = (folder / "memory.stat").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    facts = dict(line.split()[:2] for line in lines if len(line.split()) == 2)
    return sum(int(facts.get(name, 0)) for name in files.cache)


def _number(file: Path) -> int:
    """The number in a file; 0 where there is none, as in `max`."""
    try:
        return int(file.read_text(encoding="utf-8").strip())
    except (OSError, ValueError):
        return 0
