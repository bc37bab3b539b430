"""The C compiler: a C file beside our Python is compiled on first use, once per processor and source, and cached."""

import atexit
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FLAGS = ("-O3", "-march=native", "-fopenmp", "-fPIC")
FAILED: dict[str, str] = {}
"""What the compiler said, by a library's key: this process does not try it again, which would take many seconds."""


def compile_library(sources: Sequence[Path], *, headers: Sequence[Path] = (), flags: Sequence[str] = ()) -> ctypes.CDLL:
    """C files as one library.

    Args:
        sources: to compile.
        headers: what they include; a change there compiles anew.
        flags: of the compiler, besides `FLAGS`.

    Raises:
        OSError: if there is no C compiler, or it fails or has failed for them in this process.
    """
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")
    if compiler is None:
        raise OSError("no C compiler (cc) was found for a small C file")
    text = b"".join(file.read_bytes() for file in (*sources, *headers))
    command, processor = [compiler, *FLAGS, *flags], processor_fact("flags") or platform.processor()
    key = hashlib.sha256(text + processor.encode() + " ".join(command).encode()).hexdigest()[:16]
    name, folder = f"native-{key}.so", _kept_folder()
    if folder is not None and (folder / name).is_file():
        return ctypes.CDLL(str(folder / name))
    if folder is None or not os.access(folder, os.W_OK):
        folder = _own_folder()
    target = folder / name
    if not target.is_file():
        _make(command, sources, target, key)
    return ctypes.CDLL(str(target))


def _make(command: list[str], sources: Sequence[Path], target: Path, key: str) -> None:
    """Compile a library, unless that has failed before."""
    if key in FAILED:
        raise OSError(FAILED[key])
    try:
        with tempfile.TemporaryDirectory(dir=target.parent) as work:
            _compile(command, sources, Path(work)).replace(target)
    except OSError as error:
        FAILED[key] = str(error)
        raise


def _kept_folder() -> Path | None:
    """Where libraries are kept from process to process; None without a home folder, or where it is read-only."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "expertier"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: the user has no home folder
        return None
    return folder


@functools.cache
def _own_folder() -> Path:
    """A folder of this process alone, removed at its end: anybody could have put a library into a common one."""
    made = tempfile.TemporaryDirectory(prefix="expertier-")
    atexit.register(made.cleanup)
    return Path(made.name)


def _compile(command: list[str], sources: Sequence[Path], work: Path) -> Path:
    """The library, linked with torch's own OpenMP if that is visible: two pools of threads would disturb each other."""
    built, compiled = work / "native.so", [str(work / f"{source.stem}.o") for source in sources]
    calls = [[*command, "-c", str(source), "-o", target] for source, target in zip(sources, compiled, strict=True)]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(_run, calls))
    for openmp in ((), ("-fopenmp",)):
        _run([command[0], "-shared", *openmp, *compiled, "-lm", "-o", str(built)])
        try:
            ctypes.CDLL(str(built))
            return built
        except OSError as error:
            problem = error
    raise problem


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines()
        problem = [line for line in said if "error:" in line] or said
        raise OSError(f"our C could not be compiled: {' '.join(problem)[:300]}")


def processor_fact(name: str) -> str:
    """What Linux says of the first processor under a name such as `flags` or `vendor_id`; empty if it says nothing."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")
