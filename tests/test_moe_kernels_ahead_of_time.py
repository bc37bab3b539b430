"""Compile shipped configurations for devices that are not there, and assert what came out."""

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parent.parent
SHARED_LIMIT_BYTES = {"sm80": 163 << 10, "sm86": 99 << 10, "sm90": 227 << 10, "sm100": 227 << 10, "gfx942": 64 << 10}
TENSOR_CORES = {"sm80": "mma", "sm86": "mma", "sm90": "wgmma", "sm100": "tcgen05", "gfx942": "mfma"}
PRODUCTS = {"up_kernel", "down_kernel", "grad_activation_kernel", "grad_input_kernel", "grad_weight_kernel"}
ALL_KERNELS = PRODUCTS | {
    "histogram_kernel", "prefix_kernel", "group_kernel", "tile_map_kernel", "gather_sum_kernel", "grad_bias_kernel",
    "bias_dot_kernel", "decode_kernel", "decode_activation_kernel", "combine_kernel",
}  # fmt: skip


def printed(script, *arguments):
    """Lines; compilation needs a process whose kernels are not interpreted."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def check(entry):
    what = f"{entry['name']} {entry['kernel']} on {entry['arch']}"
    arch, counts = entry["arch"], entry["instructions"]
    assert entry["spill_bytes"] == 0, what
    assert entry["shared_bytes"] <= SHARED_LIMIT_BYTES[arch], what
    is_half_precision = entry["name"] != "single"
    if entry["kernel"] in PRODUCTS | {"decode_kernel"} and is_half_precision:
        # tiles of 16 rows are too low for the asynchronous tensor cores of sm90 and sm100
        is_low = entry["name"].endswith("/few") and entry["kernel"] != "grad_weight_kernel"
        assert counts[TENSOR_CORES[arch]] or (is_low and counts["mma"]), what
        assert counts["async_copy"] or arch == "gfx942", what
    if entry["kernel"] == "decode_kernel" and "/int4" in entry["name"]:
        assert counts["integer_to_float"] <= 1, f"{what}: codes must become numbers without conversions"


SOME = {
    "training": (("sm90", "gfx942"), "dense/many", ("up_kernel", "grad_activation_kernel")),
    "down": (("sm80", "sm100"), "dense/many", ("down_kernel",)),
    "decode-int4": (("sm90",), "decode/int4/T1", ("decode_kernel",)),
    # with the tiles of dense weights these spill
    "fp8": (("sm90",), "fp8/many", ("down_kernel",)),
    "relu2": (("sm90", "sm100"), "relu2/many", ("grad_activation_kernel",)),
}
"""Architectures, prefix of the configurations' names, kernels."""
EACH = """
import json, sys
from moe.kernels.tuning.ahead_of_time import main

for name, arguments in json.loads(sys.argv[1]).items():
    print(name)
    sys.argv[1:] = arguments
    main()
"""


def compiled(commands):
    """By name: an entry per kernel that one process compiled when it was given these arguments."""
    entries = {name: [] for name in commands}
    for line in printed(EACH, json.dumps(commands)):
        if line in entries:
            current = entries[line]
        else:
            current.append(json.loads(line))
    return entries


@pytest.mark.slow
def test_some_configurations():
    found = compiled(
        {
            name: ["--json", "--arch", *archs, "--only", only, "--kernels", ",".join(kernels)]
            for name, (archs, only, kernels) in SOME.items()
        }
    )
    for name, (archs, _, kernels) in SOME.items():
        assert {(entry["arch"], entry["kernel"]) for entry in found[name]} == set(product(archs, kernels))
        for entry in found[name]:
            check(entry)


@pytest.mark.slow
@pytest.mark.parametrize("arch", list(SHARED_LIMIT_BYTES))
def test_every_shipped_configuration(arch):
    entries = compiled({"all": ["--json", "--arch", arch]})["all"]
    assert {entry["kernel"] for entry in entries} == ALL_KERNELS
    for entry in entries:
        check(entry)


# a device that only says what it is
STAND_IN = """
import triton
from triton.runtime import driver
from moe.kernels.tuning import ahead_of_time
from moe.kernels.tuning.planned import compile_together

class Device:
    def get_current_target(self):
        return ahead_of_time.TARGETS["sm90"]
    def get_current_device(self):
        return 0
    def get_current_stream(self, device):
        return 0

driver.set_active(Device())
launches = list(ahead_of_time.shipped_launches("sm90"))
"""
DERIVE = """
derived = []
def note(*_, **given):
    derived.append(given["compile"])
    return True  # do not compile

triton.knobs.runtime.jit_cache_hook = note
for name, launch in launches:
    if not name.startswith(("dense/many", "gpt_oss/some", "int4/some", "slots", "split/int8")):
        continue
    derived.clear()
    launch.kernel.warmup(grid=launch.grid, **launch.arguments, **launch.options())
    ours, theirs = ahead_of_time._source(launch), derived[0]
    assert ours.signature == theirs["signature"], (name, launch.kernel)
    assert ours.constants == theirs["constants"], (name, launch.kernel)
    # Triton 3.6 leaves parameters without a hint out
    hints = {path: hint for path, hint in ours.attrs.items() if hint}
    assert hints == {path: hint for path, hint in theirs["configs"][0].items() if hint}, (name, launch.kernel)
    print(name, launch.kernel.__name__)
"""
COMPILE_TOGETHER = """
triton.knobs.runtime.jit_cache_hook = None
few = {launch.kernel: launch for _, launch in launches[:3]}
compile_together(few.values())
for kernel in few:
    (compiled,) = kernel.device_caches[0][0].values()
    assert compiled.asm["cubin"]
    print(kernel.__name__)
"""


@pytest.mark.slow
def test_what_is_compiled_is_what_the_launcher_would_compile_and_is_ready_for_its_launch():
    """Triton's own launcher derives the same types, constants and divisibility hints from our launches."""
    lines = printed(STAND_IN + DERIVE + COMPILE_TOGETHER)
    assert {line.split()[1] for line in lines[:-3]} == ALL_KERNELS
    assert lines[-3:] == ["histogram_kernel", "prefix_kernel", "group_kernel"]


def test_interpreted_kernels_are_not_compiled():
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("kernels of this process are not interpreted")
    from moe.kernels.tuning.ahead_of_time import compile_shipped

    with pytest.raises(ValueError, match="without TRITON_INTERPRET"):
        next(compile_shipped("sm90"))
