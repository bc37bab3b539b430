"""`auto` in a real control group, beside a neighbour that holds a part of it."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.offloaded_process import run_offloaded, save_model

MEMORY = Path("/sys/fs/cgroup/memory")
LIMIT_BYTES, NEIGHBOUR_BYTES = 1000 << 20, 400 << 20
ENTER = 'echo $$ > "$0/cgroup.procs" && exec "$@"'
HOLD = "import sys, time; held = bytearray(b'1') * int(sys.argv[1]); print('held', flush=True); time.sleep(600)"
SHARE = """
import mmap, sys, time
held = mmap.mmap(-1, int(sys.argv[1]))
held.write(b'1' * int(sys.argv[1]))
print('held', flush=True)
time.sleep(600)
"""


@pytest.fixture
def group():
    folder = MEMORY / f"expertier_test_{os.getpid()}"
    try:
        folder.mkdir()
        (folder / "memory.limit_in_bytes").write_text(str(LIMIT_BYTES))
    except OSError as error:
        pytest.skip(f"no control group of version 1 can be made here: {error}")
    yield folder
    for _ in range(50):  # the kernel gives a group up a moment after its last process
        try:
            folder.rmdir()
            return
        except OSError:
            time.sleep(0.1)


@pytest.fixture(params=[HOLD, SHARE], ids=["private", "shared"])
def neighbour(group, request):
    command = ["sh", "-c", ENTER, str(group), sys.executable, "-c", request.param, str(NEIGHBOUR_BYTES)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


@pytest.mark.slow
def test_auto_beside_a_neighbour_is_not_killed(group, neighbour, tmp_path):
    folder = save_model(
        "qwen3_moe", tmp_path, hidden_size=512, moe_intermediate_size=512, num_experts=64, num_local_experts=64
    )
    enter = ("sh", "-c", ENTER, str(group))
    found = run_offloaded(folder, *enter, cpu_memory="auto", context=512, prompt_tokens=400)
    assert neighbour.poll() is None
    assert found["peak_bytes"] <= found["limit_bytes"] <= 0.9 * LIMIT_BYTES
    usage = int((group / "memory.max_usage_in_bytes").read_text())
    assert NEIGHBOUR_BYTES < usage <= LIMIT_BYTES


@pytest.mark.slow
def test_a_budget_that_forgets_the_neighbour_is_killed(group, neighbour, tmp_path):
    """What the test above would not notice if the group did not bind."""
    folder = save_model(
        "qwen3_moe", tmp_path, hidden_size=512, moe_intermediate_size=512, num_experts=64, num_local_experts=64
    )
    with pytest.raises(AssertionError, match="ended with -9"):
        run_offloaded(folder, "sh", "-c", ENTER, str(group), cpu_memory=LIMIT_BYTES, context=512, prompt_tokens=400)
