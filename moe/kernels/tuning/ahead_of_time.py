"""Compile launches for devices that are not there, and read what came out: registers, spills, memory, instructions.

`python -m moe.kernels.tuning.ahead_of_time --arch sm90` prints a line per kernel of every shipped configuration. It
must run in a process without `TRITON_INTERPRET`.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Container, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ..launching.launch import Launch, is_interpreted
from ..launching.tiles import FALLBACKS, ROW_CLASSES, table_tiles
from ..weights.activation import Activation
from ..weights.quantise import FORMATS, QuantisedWeight
from ..weights.weights import ExpertWeights
from .planned import decode_launches, layer_launches, meta_weights

# compute capability or architecture, and threads per warp
TARGETS = {
    "sm80": GPUTarget("cuda", 80, 32),
    "sm86": GPUTarget("cuda", 86, 32),
    "sm90": GPUTarget("cuda", 90, 32),
    "sm100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# the most a program may ask for: opt-in limits of A100, RTX 3090/4090, H100/H200, B200; local data share of MI300
SHARED_LIMIT_BYTES = {"sm80": 163 << 10, "sm86": 99 << 10, "sm90": 227 << 10, "sm100": 227 << 10, "gfx942": 64 << 10}
# streaming multiprocessors or compute units of A100, RTX 3090, H100/H200, B200, MI300X: few tokens are spread over them
PROCESSORS = {"sm80": 108, "sm86": 82, "sm90": 132, "sm100": 148, "gfx942": 304}
INSTRUCTIONS = {
    "wgmma": r"\bHGMMA\b",
    "mma": r"\bHMMA\b",
    "tcgen05": r"\bUTCHMMA\b|\bUTCOMMA\b|\bUTC\w*MMA\b",
    "async_copy": r"\bLDGSTS\b|\bUTMALDG\b",
    "integer_to_float": r"\bI2F\w*\b",
    "mfma": r"\bv_mfma_\w+",
}
# bytes of alignment, or factor of a number, that Triton's launcher passes on as a hint
DIVISIBILITY = 16
TYPE_NAMES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
}


@dataclass(frozen=True)
class Compiled:
    """What a kernel needs on a target.

    Args:
        kernel, arch: name of the kernel, and key of `TARGETS`.
        registers: registers per thread; 255 is the most on NVIDIA.
        spill_bytes: per thread, to local memory (spilled registers times four on AMD).
        shared_bytes: shared memory (local data share) per program.
        instructions: how often those of `INSTRUCTIONS` occur.
    """

    kernel: str
    arch: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    instructions: dict[str, int]


def compile_launch(launch: Launch, arch: str) -> Compiled:
    """Compile one launch as the runtime would for these arguments.

    Args:
        launch: from `layer_launches` or `decode_launches`.
        arch: a key of `TARGETS`.

    Returns:
        What the kernel needs.

    Raises:
        ValueError: if this process interprets kernels, or the target is unknown.
    """
    if is_interpreted():
        raise ValueError("kernels are interpreted in this process; compile them in one without TRITON_INTERPRET")
    if arch not in TARGETS:
        raise ValueError(f"unknown target {arch!r}; known are {', '.join(TARGETS)}")
    source = _source(launch)
    compiled = triton.compile(source, target=TARGETS[arch], options=launch.options())
    if TARGETS[arch].backend == "hip":
        registers, spill_bytes, assembly = _read_amd(compiled.asm["amdgcn"])
    else:
        registers, spill_bytes, assembly = _read_nvidia(compiled.asm["cubin"])
    counts = {name: len(re.findall(pattern, assembly)) for name, pattern in INSTRUCTIONS.items()}
    name = launch.kernel.__name__
    return Compiled(name, arch, registers, spill_bytes, compiled.metadata.shared, counts)


def _source(launch: Launch) -> ASTSource:
    """The signature that Triton's own launcher would derive: constants, types, and what is divisible by 16."""
    kernel = launch.kernel
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = launch.arguments[parameter.name]
        is_aligned = False
        if isinstance(value, Tensor):
            signature[parameter.name] = f"*{TYPE_NAMES[value.dtype]}"
            is_aligned = True
        elif parameter.is_constexpr or value is None or value == 1:
            signature[parameter.name] = "constexpr"
            constants[(index,)] = value
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            is_aligned = value % DIVISIBILITY == 0
        attributes[(index,)] = [["tt.divisibility", DIVISIBILITY]] if is_aligned else []
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)


def _read_nvidia(cubin: bytes) -> tuple[int, int, str]:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _output(tools / "cuobjdump", "--dump-resource-usage", path)
        assembly = _output(tools / "nvdisasm", path)
    registers = int(re.search(r"REG:(\d+)", usage).group(1))
    spill_bytes = int(re.search(r"STACK:(\d+)", usage).group(1)) + int(re.search(r"LOCAL:(\d+)", usage).group(1))
    return registers, spill_bytes, assembly


def _output(*command: object) -> str:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout


def _read_amd(assembly: str) -> tuple[int, int, str]:
    registers = int(re.search(r"\.vgpr_count:\s+(\d+)", assembly).group(1))
    spilled = int(re.search(r"\.vgpr_spill_count:\s+(\d+)", assembly).group(1))
    return registers, 4 * spilled, assembly


def shipped_launches(arch: str) -> Iterator[tuple[str, Launch]]:
    """Every configuration of the table for an architecture, with a name.

    They are every format and layout in every row class, decode with whole and split sums, experts in cache slots,
    float16 and float32.
    """
    layers = _layers()
    for name, weights in layers.items():
        for rows in ROW_CLASSES:
            tiles = table_tiles(arch, "half", rows, is_quantised=isinstance(weights.up, QuantisedWeight))
            for launch in layer_launches(weights, 4096, 8, torch.bfloat16, tiles, trains=True):
                yield f"{name}/{rows}", launch
    for name, weights in layers.items():
        for num_tokens in (1, 64):
            for launch in decode_launches(weights, num_tokens, 8, torch.bfloat16):
                yield f"decode/{name}/T{num_tokens}", launch
        for launch in decode_launches(weights, 1, 8, torch.bfloat16, PROCESSORS[arch]):
            yield f"split/{name}", launch
    cached = replace(layers["dense"], slot_E=torch.empty(512, dtype=torch.int32, device="meta"))
    slots = layer_launches(cached, 4096, 8, torch.bfloat16, table_tiles(arch, "half", "some"), trains=False)
    for launch in slots + decode_launches(cached, 1, 8, torch.bfloat16, PROCESSORS[arch]):
        yield "slots", launch
    yield from _float16_launches(arch)
    single = meta_weights(768, 256, 64, torch.float32)
    for launch in layer_launches(single, 512, 4, torch.float32, FALLBACKS["single"], trains=True):
        yield "single", launch


def _layers() -> dict[str, ExpertWeights]:
    gpt_oss = Activation(alpha=1.702, limit=7.0, shift=1.0)
    return {
        "dense": meta_weights(2048, 768, 128, torch.bfloat16),
        "gpt_oss": meta_weights(
            2880, 2880, 128, torch.bfloat16, has_bias=True, is_transposed=True, is_halves=False, activation=gpt_oss
        ),
        "relu2": meta_weights(2048, 768, 128, torch.bfloat16, activation=Activation("relu2", gated=False)),
    } | {name: meta_weights(2048, 768, 128, torch.bfloat16, quantised=name) for name in FORMATS}


def _float16_launches(arch: str) -> Iterator[tuple[str, Launch]]:
    """Dense and int4 with bfloat16's tiles; float16 turns int4 codes into numbers by another bit pattern."""
    for name in (None, "int4"):
        weights = meta_weights(2048, 768, 128, torch.float16, quantised=name)
        tiles = table_tiles(arch, "half", "many", is_quantised=name is not None)
        for launch in layer_launches(weights, 16384, 8, torch.float16, tiles, trains=True):
            yield f"float16/{name or 'dense'}", launch
        for launch in decode_launches(weights, 1, 8, torch.float16):
            yield f"decode/float16/{name or 'dense'}", launch


def compile_shipped(arch: str, prefix: str = "", kernels: Container[str] = ()) -> Iterator[tuple[str, Compiled]]:
    """Compile what the table ships for an architecture, each different launch once.

    Args:
        arch: a key of `TARGETS`.
        prefix: of the configurations' names; all by default.
        kernels: names of kernels; all by default.

    Returns:
        Pairs of configuration and what its kernel needs.
    """
    seen = set()
    for name, launch in shipped_launches(arch):
        kernel = launch.kernel.__name__
        scalars = ((key, str(value)) for key, value in launch.arguments.items() if not isinstance(value, Tensor))
        identity = (name, kernel, tuple(sorted(scalars)))
        if name.startswith(prefix) and (not kernels or kernel in kernels) and identity not in seen:
            seen.add(identity)
            yield name, compile_launch(launch, arch)


def main() -> None:
    """Print a line per compiled kernel; with `--json`, one JSON object per line."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--arch", choices=list(TARGETS), nargs="+", required=True)
    parser.add_argument("--only", default="", help="configurations whose name starts so")
    parser.add_argument("--kernels", default="", help="kernels separated by commas; all if empty")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    for arch in options.arch:
        for name, found in compile_shipped(arch, options.only, tuple(filter(None, options.kernels.split(",")))):
            if options.json:
                print(json.dumps({"name": name, **asdict(found)}), flush=True)
                continue
            used = {key: count for key, count in found.instructions.items() if count}
            print(
                f"{arch:6} {name:24} {found.kernel:26} {found.registers:4} registers {found.spill_bytes:5} B spilled "
                f"{found.shared_bytes:7} B shared {used}",
                flush=True,
            )


if __name__ == "__main__":
    sys.exit(main())
