"""Which Python a session on a GPU runs with: one that is there and sees the GPU, else a fresh one with the CUDA build.

Standard library only: nothing may be installed yet.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

NO_GPU = "no NVIDIA GPU here: nvidia-smi lists none and /dev/nvidiactl is missing; nothing was run"
DRIVER_FOLDERS = ("/usr/local/nvidia/bin", "/usr/lib/wsl/lib", "/opt/nvidia/bin")
PROBE = """
import sys
assert sys.version_info >= (3, 11), "Python 3.11 or newer"
import numpy, pydantic, pytest, rich, safetensors, torch, transformers, triton, typer, xxhash
assert torch.cuda.is_available(), "torch sees no GPU"
print(f"torch {torch.__version__}, triton {triton.__version__}, transformers {transformers.__version__}")
"""
PROBE_S = 90.0
"""torch and transformers take 10 to 20 s to import from a cold disk."""
INSTALL_S = 200.0
"""Wheels of torch and CUDA are 3 GB: two minutes at 25 MB/s, and the rest of the session has to go on."""


def find_gpu() -> str | None:
    """What the driver calls the first GPU; None without one."""
    command = shutil.which("nvidia-smi", path=os.pathsep.join([os.environ.get("PATH", ""), *DRIVER_FOLDERS]))
    if command is not None:
        try:
            done = subprocess.run([command, "-L"], capture_output=True, text=True, timeout=30, check=False)
        except (OSError, subprocess.TimeoutExpired):
            done = None
        if done is not None and done.returncode == 0 and done.stdout.startswith("GPU "):
            return done.stdout.splitlines()[0].split(":", 1)[1].split("(")[0].strip()
    return "an NVIDIA GPU (no nvidia-smi)" if Path("/dev/nvidiactl").exists() else None


def find_python(root: Path, out: Path) -> Path | str:
    """A Python with everything that the steps need, or a line that says why there is none.

    What is installed is taken as it is, whatever its versions: a machine without a network has nothing else.

    Args:
        root: folder of the sources, where environments are looked for and made.
        out: folder that gets the log of pip, if that fails.
    """
    fresh = root / ".venv-gpu" / "bin" / "python"
    for python in (root / ".venv" / "bin" / "python", Path(sys.executable), fresh):
        if python.exists() and (found := _probe(python)) is not None:
            print(f"{python}: {found}")
            return python
    print(f"nothing installed here sees the GPU; installing the CUDA build into {fresh.parents[1]}")
    if (problem := _install(root, fresh, out / "install.log")) is not None:
        return problem
    found = _probe(fresh)
    if found is None:
        return f"{fresh} is installed, and torch sees no GPU: is the driver older than this CUDA build?"
    print(f"{fresh}: {found}")
    return fresh


def _probe(python: Path) -> str | None:
    """Versions, if this Python can run the steps."""
    done = _run([str(python), "-c", PROBE], PROBE_S)
    return done.stdout.strip() if done is not None and done.returncode == 0 else None


def _install(root: Path, python: Path, log: Path) -> str | None:
    """Make the environment; a line that says what failed, or None."""
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    make = [sys.executable, "-m", "venv", str(python.parents[1])]
    for command in (make, [*pip, "-c", "constraints.txt", "-e", ".[torch,dev]"]):
        done = _run(command, INSTALL_S, root)
        if done is None:
            return f"installing took longer than {INSTALL_S:.0f} s; `make gpu` again goes on from pip's cache"
        if done.returncode:
            log.write_text(done.stdout + done.stderr, encoding="utf-8")
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            return f"installing failed: {reason[:200]} (all of it: {log})"
    return None


def _run(
    command: Sequence[str], timeout_s: float, folder: Path | None = None
) -> subprocess.CompletedProcess[str] | None:
    """What a command said; None if it took longer."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, cwd=folder, check=False)
    except subprocess.TimeoutExpired:
        return None
