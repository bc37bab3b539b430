"""Bytes of training steps and of plans, as the interface counts them, beside their floors and our own counts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.rank_processes import NEW_NETWORK, may_make_namespaces

ROOT = Path(__file__).parent.parent
IN_NAMESPACE = "ip link set lo up && exec {python} -c '{code}'"
CODE = "import json; from tests.rank_processes import run_ranks; print(json.dumps(run_ranks(2, {arguments})))"
HEADERS = 1.015
"""Headers and acknowledgements on a loopback interface, whose packets are large."""


def counted(*arguments):
    """What two processes in a network namespace of their own counted."""
    code = CODE.format(arguments=", ".join(f'"{argument}"' for argument in arguments))
    shell = IN_NAMESPACE.format(python=sys.executable, code=code)
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*NEW_NETWORK, "sh", "-c", shell], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=800
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(not may_make_namespaces(), reason="needs the right to make network namespaces")
def test_an_interface_counts_what_we_count_and_what_the_floors_say(subtests):
    found = counted("counted_ranks", "data=2", "expert=2")
    with subtests.test("rows of a plan"):
        placed = found["placed"]
        assert placed["bytes"] <= placed["moved"] <= HEADERS * placed["bytes"]
    for layout in ("data=2", "expert=2"):
        with subtests.test(f"training steps, {layout}"):
            step = found[layout]
            # gloo sums gradients whole on every process instead of leaving each with its part
            expected = step["floor"] + step["gradients"]
            assert expected <= step["moved"] <= HEADERS * expected
