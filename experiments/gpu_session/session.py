"""Runs the steps of a session one after another, each in a process group that ends with its deadline, and keeps notes.

Standard library only.
"""

import contextlib
import csv
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path

from .steps import Step

TOTAL_S = 530.0
"""Nine minutes, less ten seconds for an interrupted step to say what it has."""
LEAST_S = 15.0
"""With less time left a step is not begun: importing torch takes most of that."""
GRACE_S = 10.0
"""After an interrupt: benchmarks print and save what they have measured."""
COUNTS = re.compile(r"(\d+) (passed|failed|errors?|skipped)")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One line of the record; counts are those of tests, empty for other steps.

    `outcome` is passed, failed, interrupted (by its deadline) or left out (no time for it).
    """

    step: str
    outcome: str
    exit_code: int | None = None
    seconds: float = 0.0
    limit_s: float = 0.0
    passed: int | None = None
    failed: int | None = None
    skipped: int | None = None


def run_session(
    steps: Sequence[Step],
    out: Path,
    *,
    root: Path,
    total_s: float = TOTAL_S,
    gpu: str = "",
    began_s: float | None = None,
) -> int:
    """Run the steps; `session.csv`, `session.json`, a log of each step and today's GPU records go into `out`.

    Args:
        steps: in the order of importance.
        out: folder for everything that is left behind.
        root: folder of the sources, where the steps run.
        total_s: seconds of all steps together.
        gpu: its name, for the record.
        began_s: `time.monotonic()` when the session began; now without it.

    Returns:
        0 if every step passed, else 1.
    """
    began = time.monotonic() if began_s is None else began_s
    outcomes: list[Outcome] = []
    for step in steps:
        left_s = total_s - (time.monotonic() - began)
        if left_s < LEAST_S:
            outcomes.append(Outcome(step=step.name, outcome="left out", limit_s=step.limit_s))
        else:
            print(f"{step.name}: {' '.join(step.command)}", flush=True)
            outcomes.append(run_step(replace(step, limit_s=min(step.limit_s, left_s)), out, root))
        print(_line(outcomes[-1]), flush=True)
        _write(outcomes, out, gpu)
    copied = _copy_records(root / "experiments" / "records", out / "records")
    print(f"logs, tables and {copied} new records are in {out}")
    return 0 if all(one.outcome == "passed" for one in outcomes) else 1


def run_step(step: Step, out: Path, root: Path) -> Outcome:
    """Run one command until it ends or its deadline comes; what it prints goes to `<out>/<name>.log`."""
    log, began = out / f"{step.name}.log", time.monotonic()
    with log.open("wb") as stream:
        process = subprocess.Popen(
            step.command, cwd=root, stdout=stream, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            start_new_session=True, env=os.environ | {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        try:
            code, is_late = process.wait(step.limit_s), False
        except subprocess.TimeoutExpired:
            code, is_late = _end(process), True
        except BaseException:
            _end(process)
            raise
    said = log.read_text(encoding="utf-8", errors="replace")
    outcome = "interrupted" if is_late else "failed" if code else "passed"
    seconds = round(time.monotonic() - began, 1)
    return Outcome(
        step=step.name, outcome=outcome, exit_code=code, seconds=seconds, limit_s=step.limit_s, **_counts(said)
    )


def _end(process: "subprocess.Popen[bytes]") -> int:
    """Interrupt a step, and kill its whole group if it does not end: workers and compilers too."""
    os.killpg(process.pid, signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE_S)
    with contextlib.suppress(ProcessLookupError):  # the group outlives its first process if that left others behind
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


def _counts(said: str) -> dict[str, int]:
    """Tests by what became of them: from pytest's last line, or line by line if it did not come to that."""
    ends = [line for line in said.splitlines() if re.search(r" in [\d.]+s", line) and COUNTS.search(line)]
    if ends:
        found = {name: int(number) for number, name in COUNTS.findall(ends[-1])}
        wrong = found.get("failed", 0) + found.get("error", 0) + found.get("errors", 0)
        return {"passed": found.get("passed", 0), "failed": wrong, "skipped": found.get("skipped", 0)}
    lines = {name: len(re.findall(rf"\b{name}\b", said)) for name in ("PASSED", "FAILED", "SKIPPED")}
    return {name.lower(): count for name, count in lines.items()} if any(lines.values()) else {}


def _line(one: Outcome) -> str:
    tests = "" if one.passed is None else f", {one.passed} tests passed, {one.failed} failed, {one.skipped} skipped"
    return f"{one.step}: {one.outcome} after {one.seconds:.0f} s{tests}"


def _write(outcomes: Sequence[Outcome], out: Path, gpu: str) -> None:
    """After every step, so that a session that is cut off leaves what it had."""
    rows = [asdict(one) for one in outcomes]
    with (out / "session.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    facts = {"gpu": gpu, "date": date.today().isoformat(), "steps": rows}
    (out / "session.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def _copy_records(records: Path, out: Path) -> int:
    """Copy today's GPU records beside the logs, for a machine of which only that folder comes back."""
    found = [folder for folder in records.glob(f"{date.today().isoformat()}_*-gpu") if folder.is_dir()]
    for folder in found:
        shutil.copytree(folder, out / folder.name, dirs_exist_ok=True)
    return len(found)
