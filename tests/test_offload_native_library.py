"""Instruction sets that are forbidden: every order that is left computes the same products, and `exact` stays exact."""

import ctypes
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from offload.native import library
from offload.native.library import FORBIDDING, SOURCES, WITHOUT

ROOT = Path(__file__).parent.parent

# prints the orders, and whether products of plain, compressed and MXFP4 weights are right and torch's where claimed
PROGRAM = """
import json, sys
import torch
from torch.nn.functional import linear
from offload.codes.decode import decode
from offload.codes.encoding import Encoding
from offload.compute.matvec import Matvecs
from offload.compute.orders import SUMMING_ROWS, orders
from offload.formats.compression import CompressedMatrix, compress
from offload.codes.stored_matrix import StoredMatrix
from offload.native.kernel_matrix import plain_matrix

torch.manual_seed(0)
torch.set_num_threads(1)
found = {"orders": [order.name for order in orders()], "wrong": []}
for rows, shape in ((1, (96, 256)), (3, (64, 2880)), (17, (160, 128))):
    x, weight = torch.randn(rows, shape[1]).bfloat16(), torch.randn(shape).bfloat16()
    encoding = Encoding(codes="e2m1", group_rows=1, group_columns=32, scale="EXP2", product="F32")
    sizes = encoding.part_bytes(*shape)
    parts = {"codes": torch.randint(0, 256, (sizes["codes"],), dtype=torch.uint8)}
    parts["scales"] = torch.randint(118, 130, (sizes["scales"],), dtype=torch.uint8)
    four_bits = StoredMatrix(encoding=encoding, rows=shape[0], columns=shape[1], parts=parts)
    plain_of_four = decode(encoding, parts, *shape, torch.bfloat16)
    cases = [("plain", plain_matrix(weight), weight), ("mxfp4", four_bits.kernel_matrix(), plain_of_four)]
    if shape[1] % 64 == 0:
        stored = CompressedMatrix().encode(weight)
        cases.append(("compressed", CompressedMatrix().kernel_matrix(stored, shape), weight))
    for order in orders():
        if not order.fits(shape):
            continue
        for name, matrix, plain in cases:
            out, same = torch.empty(rows, shape[0]).bfloat16(), torch.empty(rows, shape[0]).bfloat16()
            order.multiply(x, (matrix,), (out,))
            order.multiply(x, (plain_matrix(plain),), (same,))
            expected = x.double() @ plain.double().t()
            most = 2**-8 * expected.abs() + 2e-5 * shape[1] * plain.abs().max()
            close = ((out.double() - expected).abs() <= most).all()
            if not (torch.equal(out, same) and close):
                found["wrong"].append([order.name, name, rows, *shape])
        if order.name in SUMMING_ROWS:
            turned = torch.empty(rows, shape[1]).bfloat16()
            order.multiply_turned(out, weight, turned)
            expected = out.double() @ weight.double()
            most = 2**-8 * expected.abs() + 2e-5 * shape[0] * out.abs().max().double()
            if not ((turned.double() - expected).abs() <= most).all():
                found["wrong"].append([order.name, "turned", rows, *shape])
    exact = Matvecs("exact")
    out = torch.empty(rows, shape[0]).bfloat16()
    if exact.multiply(x, (weight,), (out,)) and not torch.equal(out, linear(x, weight)):
        found["wrong"].append(["exact", rows, *shape])
    for is_turned in (False, True):
        room = torch.empty(shape[1], shape[0]).bfloat16().t() if is_turned else torch.empty(shape).bfloat16()
        of_rows = exact.rows_orders([room], [2, 40])
        room.copy_(weight)
        for count, chosen in of_rows.items():
            many, out = torch.randn(count, shape[1]).bfloat16(), torch.empty(count, shape[0]).bfloat16()
            if chosen is not None:
                chosen[0].multiply(many, (plain_matrix(weight),), (out,))
                if not torch.equal(out, torch.mm(many, room.t())):
                    found["wrong"].append(["exact", count, *shape, is_turned])
print(json.dumps(found))
"""


def run(forbidden, isa=None):
    environment = os.environ | {FORBIDDING: forbidden, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment |= {} if isa is None else {"ONEDNN_MAX_CPU_ISA": isa}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("forbidden", "isa"),
    [
        ("amx", "AVX512_CORE_BF16"),
        pytest.param("amx,avx512_bf16,avx512_vbmi", "AVX512_CORE", marks=pytest.mark.slow),
        pytest.param("amx,avx512_bf16,avx512", "AVX2", marks=pytest.mark.slow),
        pytest.param("amx,avx512_bf16,avx512,avx2", "AVX2", marks=pytest.mark.slow),
    ],
)
def test_products_without_some_instruction_sets(forbidden, isa):
    found = run(forbidden, isa)
    assert found["wrong"] == []
    assert not {"amx", "avx512_bf16", "avx512", "avx2"} & set(found["orders"]) & set(forbidden.split(","))


@pytest.mark.parametrize("forbidden", ["avx512_bf16,avx512_vbmi", "avx512_bf16,avx512", "avx512_bf16,avx512,avx2"])
def test_every_source_is_right_for_processors_without_some_sets(forbidden):
    """Read, not compiled: headers that one set includes may be missing with another."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("no C compiler, or one for another kind of processor")
    flags = [flag for name in ("amx", *forbidden.split(",")) for flag in WITHOUT[name]]
    strict = ["-fsyntax-only", "-Werror=implicit-function-declaration", "-march=native", "-fopenmp", *flags]
    done = subprocess.run([compiler, *strict, *map(str, SOURCES)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_two_callers_do_not_set_each_others_types(monkeypatch):
    first = library.c_function("expertier_sum", library.POINTER, library.NUMBER, result=ctypes.c_float)
    if first is None:
        pytest.skip("no C compiler")
    values = (ctypes.c_float * 3)(1, 2, 4)
    library.c_function("expertier_sum", library.NUMBER)
    assert first(values, 3) == 7
    with pytest.raises(AttributeError):
        library.c_function("expertier_of_nowhere")

    def none():
        raise OSError("no compiler")

    monkeypatch.setattr(library, "library", none)
    assert library.c_function("expertier_sum", library.NUMBER) is None


def test_a_set_that_is_not_known_is_refused():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FORBIDDING, "avx1024")
        with pytest.raises(ValueError, match="avx1024"):
            library._forbidden_flags()
    assert set(WITHOUT) == {"amx", "avx512_bf16", "avx512_vbmi", "avx512", "avx2"}
