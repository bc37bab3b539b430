"""Fine-tuning on a disk that is full again and again: run as a module in a mount namespace of its own.

The disk is a tmpfs that begins small and grows by a little after every failure, so that each file that a run writes
meets the end of it. Children are forked, so that each finds everything imported.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.killed_runs import SETTINGS

LENGTH, STEPS, MOST_ATTEMPTS = 32, 4, 80
GROWTH = {"zo": 96, "lora": 24, "full": 320}
"""KiB that are added after a failure; a run needs some twenty times as much."""


def _child(folder: Path, out: Path, method: str) -> None:
    import torch

    from experiments import cli

    torch.set_num_threads(1)
    flags = {"method": method, "steps": STEPS, "sequence-length": LENGTH, "checkpoint-every": 1, "cache-experts": 2}
    for name, value in (flags | SETTINGS[method]).items():
        sys.argv += [f"--{name.replace('_', '-')}", ",".join(value) if isinstance(value, tuple) else str(value)]
    if (out / "finetune.json").is_file():
        sys.argv.append("--resume")
    cli.main()


def _attempt(folder: Path, out: Path, method: str) -> tuple[int, str]:
    """One run in a child; its exit code and what it said."""
    said = folder / "said"
    child = os.fork()
    if not child:
        descriptor = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 2)
        sys.argv = ["expertier", "finetune", str(folder / "model"), "--data", str(folder / "data.jsonl")]
        sys.argv += ["--out", str(out)]
        try:
            _child(folder, out, method)
        except SystemExit as ended:
            os._exit(int(ended.code or 0))
        os._exit(99)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code, said.read_text()


def _main(method: str, folder: Path) -> None:
    import transformers

    import experiments.cli  # noqa: F401  imported once, before the forks
    import offload.finetune.tune  # noqa: F401

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    assert _attempt(folder, folder / "whole", method)[0] == 0
    disk, size, failures = folder / "disk", 0, []
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", disk], check=True)
    for _ in range(MOST_ATTEMPTS):
        size += GROWTH[method]
        subprocess.run(["mount", "-o", f"remount,size={size}k", disk], check=True)
        code, said = _attempt(folder, disk / "out", method)
        if code == 0:
            break
        complaint = [line for line in said.splitlines() if line.startswith("expertier: ")]
        commits = sorted(path.name for path in (disk / "out" / "checkpoints").glob("*"))
        failures.append({"code": code, "lines": len(complaint), "said": said[-500:], "commits": commits})
    subprocess.run(["cp", "-r", disk / "out", folder / "filled"], check=True)
    print(json.dumps({"code": code, "failures": failures}))


if __name__ == "__main__":
    _main(sys.argv[1], Path(sys.argv[2]))
