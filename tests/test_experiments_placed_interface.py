"""`bench overlap` over interfaces with a rate: the rate holds, and one line says why where none can be had."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.placed.interface import BURST_BYTES, launch_apart
from tests.rank_processes import may_make_namespaces

ROOT = Path(__file__).parent.parent
SMALL = ["--tokens", "1024", "--layers", "2", "--width", "256", "--inner-width", "64", "--repeats", "3"]


def names():
    return subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout


@pytest.mark.slow
@pytest.mark.skipif(not may_make_namespaces(), reason="needs the right to make network namespaces")
def test_rows_leave_by_the_interface_of_each_process_no_faster_than_its_rate(tmp_path):
    file, before = tmp_path / "overlap.json", names()
    command = [sys.executable, "-m", "experiments.cli", "bench", "overlap", *SMALL, "--rate", "4MiB", "--json", file]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    (row,) = json.loads(file.read_text())["rates"]
    assert row["limit"] == "tbf on each process's interface"
    assert 1 < row["sent_over_rows"] < 1.1
    least_s = (row["row_bytes"] - BURST_BYTES) / row["bytes_per_s"]
    assert min(row[name] for name in ("exchange_s", "woven_s", "in_turn_s")) > least_s > 0.2
    assert names() == before


@pytest.mark.parametrize(
    ("tool", "reason"),
    [
        (None, "unshare is not installed"),
        (
            "echo cannot do this >&2; echo unshare: Operation not permitted >&2; exit 1",
            "unshare: Operation not permitted",
        ),
        ("exit 3", "exit code 3"),
    ],
)
def test_where_none_can_be_had_one_line_says_why(run, tmp_path, monkeypatch, capfd, tool, reason):
    if tool:
        (tmp_path / "unshare").write_text(f"#!/bin/sh\n{tool}\n")
        (tmp_path / "unshare").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run("bench", "overlap") == 2
    assert f"take --simulated ({reason})" in " ".join(capfd.readouterr().err.split())


@pytest.mark.parametrize("ratio", ["0.5,x", "0.5,,1", "0.1", "1,6"])
def test_ratios_of_which_nothing_would_be_said_are_refused(run, capfd, ratio):
    assert run("bench", "overlap", "--ratio", ratio) == 2
    assert "--ratio takes numbers from 0.2 to 5.0 with commas between them" in " ".join(capfd.readouterr().err.split())


def test_addresses_end():
    with pytest.raises(ValueError, match="for 1 to 253"):
        launch_apart([], 254, 1e6)
