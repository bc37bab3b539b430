"""Fine-tuning in forked processes that are killed: run as a module, so that every child finds everything imported."""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

LENGTH, STEPS, MOST_ATTEMPTS = 32, 48, 60
SETTINGS = {
    "zo": {"learning_rate": 1e-3},
    "lora": {"learning_rate": 1e-2, "targets": ("q_proj",), "rank": 2},
    "full": {"learning_rate": 1e-3, "weight_decay": 0.1},
}


def _tune(folder: Path, out: str, method: str) -> None:
    import torch

    import offload

    torch.set_num_threads(1)
    options = offload.TuneOptions(
        method=method, steps=STEPS, sequence_length=LENGTH, checkpoint_every=2, **SETTINGS[method]
    )
    resume = (folder / out / "finetune.json").is_file()
    offload.fine_tune(folder / "model", folder / "data.jsonl", folder / out, options, cache_experts=2, resume=resume)


def _forked(folder: Path, out: str, method: str) -> int:
    if child := os.fork():
        return child
    try:
        _tune(folder, out, method)
        os._exit(0)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        os._exit(1)


def _last(out: Path) -> str:
    return max((path.name for path in (out / "checkpoints").glob("step_*")), default="")


def _main(method: str, folder: Path, kills: int) -> None:
    import transformers

    import offload.finetune.tune  # noqa: F401  imported once, before the forks

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    assert os.waitstatus_to_exitcode(os.waitpid(_forked(folder, "whole", method), 0)[1]) == 0
    moments, killed = random.Random(1), 0
    for _ in range(MOST_ATTEMPTS):
        before, child = _last(folder / "killed"), _forked(folder, "killed", method)
        # opening takes most of the time: wait for a new commit, then for part of the time of the next steps
        while killed < kills and os.waitpid(child, os.WNOHANG) == (0, 0):
            if _last(folder / "killed") != before:
                time.sleep(moments.random() * 0.1)
                os.kill(child, signal.SIGKILL)
                break
            time.sleep(0.001)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        killed += code == -signal.SIGKILL
        if code != -signal.SIGKILL:
            break
    print(json.dumps({"killed": killed, "code": code}))


if __name__ == "__main__":
    _main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
