"""Our C, compiled when it is first needed: once per processor and source, into the user's cache."""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

FOLDER = Path(__file__).parent
SOURCES = (FOLDER / "matvec.c", FOLDER / "compress.c", FOLDER / "norms.c")
HEADERS = (FOLDER / "bfloat16.h", FOLDER / "compressed.h")
FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fopenmp", "-fPIC")


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled library.

    Raises:
        OSError: if there is no C compiler, or it fails.
    """
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")
    if compiler is None:
        raise OSError("no C compiler (cc) was found for a small C file")
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "expertier"
    folder.mkdir(parents=True, exist_ok=True)
    source = b"".join(file.read_bytes() for file in SOURCES + HEADERS)
    key = hashlib.sha256(source + _processor() + " ".join(FLAGS).encode()).hexdigest()[:16]
    target = folder / f"native-{key}.so"
    if not target.is_file():
        with tempfile.TemporaryDirectory(dir=folder) as work:
            _compile(compiler, Path(work)).replace(target)
    return ctypes.CDLL(str(target))


@functools.cache
def compression_kernels() -> ctypes.CDLL | None:
    """The library with the types of `expertier_compress` and `expertier_expand` set; None without a C compiler."""
    try:
        found = library()
    except OSError:
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    found.expertier_compress.argtypes = [pointer, number, number, number, pointer, pointer]
    found.expertier_compress.restype = number
    found.expertier_expand.argtypes = [pointer, number, number, pointer]
    found.expertier_expand.restype = None
    return found


def _compile(compiler: str, work: Path) -> Path:
    """The library, linked with torch's own OpenMP if that is visible: two pools of threads would disturb each other."""
    built, compiled = work / "native.so", [str(work / f"{source.stem}.o") for source in SOURCES]
    for source, target in zip(SOURCES, compiled, strict=True):
        _run([compiler, *FLAGS, "-c", str(source), "-o", target])
    for openmp in ((), ("-fopenmp",)):
        _run([compiler, "-shared", *openmp, *compiled, "-lm", "-o", str(built)])
        try:
            ctypes.CDLL(str(built))
            return built
        except OSError as error:
            problem = error
    raise problem


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"our C could not be compiled: {done.stderr.strip()[:300]}")


def _processor() -> bytes:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor().encode()
    return next((line for line in lines if line.startswith("flags")), "").encode()
