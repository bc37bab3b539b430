"""How fast products of a few rows read stored weights, for each order of summation and stored form."""

import time
from collections.abc import Callable, Sequence
from statistics import quantiles
from typing import Any

import torch

from ..codes.decode import decode
from ..codes.encoding import Encoding
from ..codes.expander import kernel_number, kernel_parameters, kernel_parts
from ..compute.orders import Order, orders
from ..formats.compression import CompressedMatrix, expand
from ..formats.gguf_blocks.expand import expand_rows, kernel_parameter
from ..native.kernel_matrix import GGUF, KernelMatrix, plain_matrix

SHAPE = (1024, 2048)
"""Rows and columns of a matrix: 4 MiB of bfloat16, as an expert of common sizes has."""
AT_ONCE = 4
"""Matrices that one call multiplies, as those of a token's experts are."""
ENCODINGS = {
    "mxfp4": Encoding(codes="e2m1", group_rows=1, group_columns=32, scale="EXP2"),
    "fp8": Encoding(codes="e4m3", group_rows=128, group_columns=128, scale="F32"),
    "int4": Encoding(codes="offset4", group_rows=1, group_columns=32, scale="BF16", product="BF16"),
    "int8": Encoding(codes="int8", group_rows=1, group_columns=0, scale="F32"),
}
"""As the most used checkpoints have them: gpt-oss, DeepSeek, Kimi-K2, and int8 rows of llm-compressor."""
USUAL_EXPONENTS = (110, 130)
"""Of scales that are powers of two: weights of 2^-17 to 2^5."""
GGUF_TYPES = {"q4_0": 18, "q8_0": 34, "q4_k": 144, "q6_k": 210}
"""Bytes of a block."""
BLOCK_COLUMNS = {"q4_0": 32, "q8_0": 32, "q4_k": 256, "q6_k": 256}
"""Columns of a block, as ggml defines them."""
HALVES = {"q4_0": (0,), "q8_0": (0,), "q4_k": (0, 2), "q6_k": (208,)}
"""Where in a block its scales of float16 stand."""
FORMS = ("plain", "compressed", *ENCODINGS, *GGUF_TYPES)

Made = tuple[KernelMatrix, torch.Tensor, int, Any]
"""A stored matrix, what it stands for, its bytes, and what holds them."""


def product_rates(
    forms: Sequence[str], rows: Sequence[int], *, num_matrices: int, repeats: int
) -> list[dict[str, Any]]:
    """Stored bytes per second that products read, beside those of plain reading; all of them take turns.

    Args:
        forms: names in FORMS.
        rows: rows of x, each number of them in its turn.
        num_matrices: of 4 MiB in bfloat16; together they should be larger than the caches.
        repeats: timed rounds, 2 or more.

    Returns:
        For each order, form and number of rows: `order`, `form`, `rows`, and `bytes_per_s_p50`, `_p20`, `_p80`.

    Raises:
        RuntimeError: if a product differs from that of the plain matrix in the same order.
    """
    generator = torch.Generator().manual_seed(0)
    stored = {form: [_make(form, generator) for _ in range(num_matrices)] for form in forms}
    runs: dict[tuple[str, str, int], tuple[int, Callable[[], object]]] = {}
    everything = [plain for plain, *_ in [(made[1],) for made in stored[forms[0]]]]
    runs["reading", "plain", 0] = sum(one.nbytes for one in everything), lambda: [_sum(one) for one in everything]
    for order in orders():
        for form, made in stored.items():
            for count in rows:
                x_nD = torch.randn(count, SHAPE[1], generator=generator).bfloat16()
                out_nF = torch.empty(count, SHAPE[0], dtype=torch.bfloat16)
                _require_equal(order, made[0], x_nD, form)
                runs[order.name, form, count] = sum(one[2] for one in made), _run(order, made, x_nD, out_nF)
    seconds: dict[tuple[str, str, int], list[float]] = {key: [] for key in runs}
    for _ in range(repeats):
        for key, (_, run) in runs.items():
            started = time.perf_counter()
            run()
            seconds[key].append(time.perf_counter() - started)
    return [_rates(key, runs[key][0], taken) for key, taken in seconds.items()]


def _run(order: Order, made: Sequence[Made], x_nD: torch.Tensor, out_nF: torch.Tensor) -> Callable[[], None]:
    matrices = [matrix for matrix, *_ in made]
    groups = [tuple(matrices[at : at + AT_ONCE]) for at in range(0, len(matrices), AT_ONCE)]
    outs = tuple(torch.empty_like(out_nF) for _ in range(AT_ONCE))

    def run() -> None:
        for group in groups:
            order.multiply(x_nD, group, outs[: len(group)])

    return run


def _sum(weight: torch.Tensor) -> torch.Tensor:
    return weight.view(torch.int64).sum()


def _rates(key: tuple[str, str, int], nbytes: int, seconds: list[float]) -> dict[str, Any]:
    order, form, rows = key
    p20, p50, p80 = (quantiles(seconds, n=10, method="inclusive")[place] for place in (7, 4, 1))
    found = {"bytes_per_s_p20": nbytes / p20, "bytes_per_s_p50": nbytes / p50, "bytes_per_s_p80": nbytes / p80}
    return {"order": order, "form": form, "rows": rows, **found}


def _require_equal(order: Order, made: Made, x_nD: torch.Tensor, form: str) -> None:
    found_nF, expected_nF = (torch.empty(len(x_nD), SHAPE[0], dtype=torch.bfloat16) for _ in range(2))
    order.multiply(x_nD, (made[0],), (found_nF,))
    order.multiply(x_nD, (plain_matrix(made[1]),), (expected_nF,))
    if not torch.equal(found_nF, expected_nF):
        raise RuntimeError(f"parity is red, so no time is printed: {form} in the order {order.name}")


def _make(form: str, generator: torch.Generator) -> Made:
    if form in ENCODINGS:
        return _make_codes(ENCODINGS[form], generator)
    if form in GGUF_TYPES:
        return _make_blocks(form, generator)
    weight_FD = torch.randn(SHAPE, generator=generator).bfloat16()
    if form == "plain":
        return plain_matrix(weight_FD), weight_FD, weight_FD.nbytes, None
    stored = CompressedMatrix().encode(weight_FD)
    assert stored is not None
    matrix = CompressedMatrix().kernel_matrix(stored, SHAPE)
    assert matrix is not None
    plain_FD = torch.empty_like(weight_FD)
    expand(stored, plain_FD)
    return matrix, plain_FD, stored.nbytes, stored


def _make_codes(encoding: Encoding, generator: torch.Generator) -> Made:
    parts = {
        role: torch.randint(256, (nbytes,), dtype=torch.uint8, generator=generator)
        for role, nbytes in encoding.part_bytes(*SHAPE).items()
    }
    count = len(parts["scales"])
    if encoding.scale == "EXP2":
        parts["scales"] = torch.randint(*USUAL_EXPONENTS, (count,), dtype=torch.uint8, generator=generator)
    elif encoding.scale == "F32":
        parts["scales"] = torch.rand(count // 4, generator=generator).view(torch.uint8)
    else:
        parts["scales"] = torch.rand(count // 2, generator=generator).bfloat16().view(torch.uint8)
    if encoding.codes == "e4m3":
        parts["codes"] &= 0xF7  # no code is NaN
    addresses = tuple(part or 0 for part in kernel_parts(parts))
    matrix = KernelMatrix(kernel_number(encoding), *SHAPE, addresses, kernel_parameters(encoding, *SHAPE))
    plain_FD = decode(encoding, parts, *SHAPE, torch.bfloat16)
    return matrix, plain_FD, sum(part.nbytes for part in parts.values()), parts


def _make_blocks(form: str, generator: torch.Generator) -> Made:
    count = SHAPE[0] * SHAPE[1] // BLOCK_COLUMNS[form]
    blocks = torch.randint(256, (count, GGUF_TYPES[form]), dtype=torch.uint8, generator=generator)
    for place in HALVES[form]:
        blocks[:, place : place + 2] = torch.rand(count, 1, generator=generator).half().view(torch.uint8)
    kind, plain_FD = form.upper(), torch.empty(SHAPE, dtype=torch.bfloat16)
    expand_rows(kind, blocks.view(-1), plain_FD)
    matrix = KernelMatrix(GGUF, *SHAPE, (blocks.data_ptr(), 0, 0, 0), kernel_parameter(kind))
    return matrix, plain_FD, blocks.nbytes, blocks
