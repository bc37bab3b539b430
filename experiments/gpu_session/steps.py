"""The steps of a session, most important first, each with a deadline of its own. Standard library only."""

import os
from dataclasses import dataclass
from pathlib import Path

FIRST_TESTS = (
    "tests/test_moe_kernels_decode.py",
    "tests/test_moe_kernels_operators.py",
    "tests/test_offload_gpu_tier.py",
)
KERNELS_S = 130
"""Of the 540 s: the goals of all layers come first in `bench kernels`, and were planned for two minutes."""
MOST_WORKERS = 8
"""Each has a CUDA context of half a gigabyte, and compiles on a core."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One command of a session.

    Args:
        name: of its log and its line in the record.
        command: program and arguments, run in the folder of the sources.
        limit_s: seconds after which it is interrupted, and killed if it does not end.
    """

    name: str
    command: tuple[str, ...]
    limit_s: float


def steps_of(python: Path, out: Path) -> tuple[Step, ...]:
    """What is run, most important first: what the other steps rest on, then what was never measured.

    Args:
        python: with torch, Triton and transformers.
        out: folder for tables.
    """
    replay, trace = out / "replay", out / "trace.npz"
    bench = (str(python), "-m", "experiments.cli", "bench")
    kernels = ("kernels", "--seconds", str(KERNELS_S), "--json", str(out / "kernels.json"), "--record")
    offload = ("offload", str(replay), "--trace", str(trace), "--device", "cuda", "--limit", "4GiB", "--limit", "8GiB")
    offload += ("--json", str(out / "offload.json"), "--record")
    return (
        Step(name="tests", command=(*_tests(python), *FIRST_TESTS), limit_s=110),
        Step(name="kernels", command=(*bench, *kernels), limit_s=KERNELS_S + 25),
        Step(name="trace", command=(str(python), "-m", "experiments.gpu_session.synthetic", str(trace)), limit_s=20),
        Step(name="offload", command=(*bench, *offload), limit_s=130),
        Step(name="more-tests", command=(*_tests(python), *_deselected(FIRST_TESTS)), limit_s=150),
    )


def _tests(python: Path) -> tuple[str, ...]:
    """Tests marked `gpu`. Verbose, so that an interrupted run says what had passed; warnings fail nothing."""
    workers = min(MOST_WORKERS, max((os.cpu_count() or 1) // 2, 1))
    command = (str(python), "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", "-m", "gpu")
    return (*command, "-o", "filterwarnings=default", *_in_parallel(python, workers))


def _in_parallel(python: Path, workers: int) -> tuple[str, ...]:
    """Options for as many workers, if the plugin is installed."""
    plugins = python.parents[1].glob("lib/python3*/site-packages/xdist/__init__.py")
    return ("-n", str(workers)) if workers > 1 and any(plugins) else ()


def _deselected(files: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"--ignore={file}" for file in files)
