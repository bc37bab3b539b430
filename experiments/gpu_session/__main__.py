"""`python -m experiments.gpu_session`, which is `make gpu`. Needs Python alone, so that it can install the rest."""

import argparse
import sys
import time
from pathlib import Path

from .environment import NO_GPU, find_gpu, find_python
from .session import TOTAL_S, run_session
from .steps import steps_of

ROOT = Path(__file__).parents[2]
"""Of the sources: this file lies two folders below."""
NOTHING_RUN = 3
"""Exit code where there is no GPU; 1 says that a step failed, 2 that nothing could be installed."""


def main(arguments: list[str]) -> int:
    """Run the session; 0 if every step passed, 1 if not, 2 without an environment, 3 without a GPU."""
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu", help="folder for logs, tables and records")
    parser.add_argument("--seconds", type=float, default=TOTAL_S, help="all steps together, installing included")
    asked = parser.parse_args(arguments)
    began_s, gpu = time.monotonic(), find_gpu()
    if gpu is None:
        print(NO_GPU)
        return NOTHING_RUN
    print(f"GPU: {gpu}")
    asked.out.mkdir(parents=True, exist_ok=True)
    python = find_python(ROOT, asked.out)
    if isinstance(python, str):
        print(python)
        return 2
    steps = steps_of(python, asked.out)
    return run_session(steps, asked.out, root=ROOT, total_s=asked.seconds, gpu=gpu, began_s=began_s)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
