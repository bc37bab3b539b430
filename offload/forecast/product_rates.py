"""How fast products of a few rows read stored weights, for each order of summation and stored form."""

import time
from collections.abc import Callable, Sequence
from math import prod
from statistics import quantiles
from typing import Any, NamedTuple

import numpy as np
import torch

from ..codes import ternary
from ..codes.decode import decode
from ..codes.encoding import Encoding
from ..codes.expander import block_parameters, kernel_number, kernel_parameters
from ..codes.levels import BASE_BITS, LevelledScheme
from ..codes.schemes import Scheme
from ..compute.orders import Order, has_integers, integers_order, orders
from ..formats.compression import CompressedMatrix, expand
from ..formats.gguf_blocks.expand import expand_rows, kernel_parameter
from ..formats.lossy.levelled import joined
from ..native.kernel_matrix import BLOCKS, COMPRESSED, GGUF, PLAIN, TERNARY, KernelMatrix, plain_matrix

SHAPE = (1024, 2048)
"""Rows and columns of a matrix: 4 MiB of bfloat16, as an expert of common sizes has."""
AT_ONCE = 4
"""Matrices that one call multiplies, as those of a token's experts are."""
ENCODINGS = {
    "mxfp4": Encoding(codes="e2m1", group_rows=1, group_columns=32, scale="EXP2"),
    "fp8": Encoding(codes="e4m3", group_rows=128, group_columns=128, scale="F32"),
    "int4": Encoding(codes="offset4", group_rows=1, group_columns=32, scale="BF16", product="BF16"),
    "int8": Encoding(codes="int8", group_rows=1, group_columns=0, scale="F32"),
    "int3": Scheme("int3", 64).encoding("BF16"),
    "int2": Scheme("int2", 64).encoding("BF16"),
}
"""As the most used checkpoints have them: gpt-oss, DeepSeek, Kimi-K2, and int8 rows of llm-compressor; then our own."""
PLANES = {f"planes-{bits}": LevelledScheme("planes", 128, bits - BASE_BITS + 1) for bits in (2, 3, 4)}
"""By the bits of a weight that are read."""
RESIDUALS = {f"residual-{levels}": LevelledScheme("residual", min(SHAPE) // 128, levels) for levels in (2, 4, 8)}
"""By the levels that are read, with the ranks that `pack` takes."""
USUAL_EXPONENTS = (110, 130)
"""Of scales that are powers of two: weights of 2^-17 to 2^5."""
GGUF_TYPES = {"q4_0": 18, "q8_0": 34, "q4_k": 144, "q6_k": 210}
"""Bytes of a block."""
BLOCK_COLUMNS = {"q4_0": 32, "q8_0": 32, "q4_k": 256, "q6_k": 256}
"""Columns of a block, as ggml defines them."""
HALVES = {"q4_0": (0,), "q8_0": (0,), "q4_k": (0, 2), "q6_k": (208,)}
"""Where in a block its scales of float16 stand."""
FORMS = ("plain", "compressed", *ENCODINGS, *PLANES, *RESIDUALS, "ternary", *GGUF_TYPES)


class Sample(NamedTuple):
    """One stored matrix, and what it stands for."""

    number: int
    """Of its form in our C."""
    parts: tuple[torch.Tensor | None, ...]
    parameter: Any
    plain_FD: torch.Tensor
    shared: tuple[torch.Tensor, ...] = ()
    """Parts that all matrices have in common."""

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts if part is not None)

    def copy(self) -> "Sample":
        """The same bytes at another place."""
        return self._replace(parts=tuple(None if part is None else part.clone() for part in self.parts))

    def matrix(self) -> KernelMatrix:
        addresses = [0 if part is None else part.data_ptr() for part in (*self.parts, *self.shared)]
        return KernelMatrix(self.number, *SHAPE, self.parameter, *addresses)


def product_rates(forms: Sequence[str], rows: Sequence[int], *, nbytes: int, repeats: int) -> list[dict[str, Any]]:
    """Stored bytes per second that products read, beside those of plain reading; all of them take turns.

    Args:
        forms: names in FORMS.
        rows: rows of x, each number of them in its turn.
        nbytes: stored bytes of each form, in matrices of 4 MiB in bfloat16; more than the last cache holds.
        repeats: timed rounds, 2 or more.

    Returns:
        For each order, form and number of rows: `order`, `form`, `rows`, stored `bits` of a weight, and
        `bytes_per_s_p50`, `_p20`, `_p80`.

    Raises:
        RuntimeError: if a product differs from that of the plain matrix in the same order; in integers, by more than
            the plain matrix is rounded by.
    """
    generator = torch.Generator().manual_seed(0)
    samples = {form: _make(form, generator) for form in forms}
    stored = {form: [sample.copy() for _ in range(-(-nbytes // sample.nbytes))] for form, sample in samples.items()}
    everything = torch.ones(nbytes // 8, dtype=torch.int64)
    runs: dict[tuple[str, str, int], tuple[int, Callable[[], object]]] = {}
    runs["reading", "plain", 0] = everything.nbytes, everything.sum
    for order in (*orders(), integers_order()):
        for form, copies in stored.items():
            if order == integers_order() and not has_integers(samples[form].matrix()):
                continue
            for count in rows:
                x_nD = torch.randn(count, SHAPE[1], generator=generator).bfloat16()
                _require_equal(order, samples[form], x_nD, form)
                runs[order.name, form, count] = sum(copy.nbytes for copy in copies), _run(order, copies, x_nD)
    seconds: dict[tuple[str, str, int], list[float]] = {key: [] for key in runs}
    for _ in range(repeats):
        for key, (_, run) in runs.items():
            started = time.perf_counter()
            run()
            seconds[key].append(time.perf_counter() - started)
    bits = {form: 8 * sample.nbytes / prod(SHAPE) for form, sample in samples.items()}
    return [_rates(key, runs[key][0], bits.get(key[1], 16.0), taken) for key, taken in seconds.items()]


def _run(order: Order, copies: Sequence[Sample], x_nD: torch.Tensor) -> Callable[[], None]:
    matrices = [copy.matrix() for copy in copies]
    groups = [tuple(matrices[at : at + AT_ONCE]) for at in range(0, len(matrices), AT_ONCE)]
    outs = tuple(torch.empty(len(x_nD), SHAPE[0], dtype=torch.bfloat16) for _ in range(AT_ONCE))

    def run() -> None:
        for group in groups:
            order.multiply(x_nD, group, outs[: len(group)])

    return run


def _rates(key: tuple[str, str, int], nbytes: int, bits: float, seconds: list[float]) -> dict[str, Any]:
    order, form, rows = key
    p20, p50, p80 = (quantiles(seconds, n=10, method="inclusive")[place] for place in (7, 4, 1))
    found = {"bytes_per_s_p20": nbytes / p20, "bytes_per_s_p50": nbytes / p50, "bytes_per_s_p80": nbytes / p80}
    return {"order": order, "form": form, "rows": rows, "bits": bits, **found}


def _require_equal(order: Order, sample: Sample, x_nD: torch.Tensor, form: str) -> None:
    found_nF, expected_nF = (torch.empty(len(x_nD), SHAPE[0], dtype=torch.bfloat16) for _ in range(2))
    order.multiply(x_nD, (sample.matrix(),), (found_nF,))
    if order == integers_order():
        is_equal = _is_within_rounding(found_nF, x_nD, sample.plain_FD)
    else:
        order.multiply(x_nD, (plain_matrix(sample.plain_FD),), (expected_nF,))
        is_equal = torch.equal(found_nF, expected_nF)
    if not is_equal:
        raise RuntimeError(f"parity is red, so no time is printed: {form} in the order {order.name}")


def _is_within_rounding(found_nF: torch.Tensor, x_nD: torch.Tensor, plain_FD: torch.Tensor) -> bool:
    """Whether sums differ from those of weights that were rounded to bfloat16 by what that, integers of x and the
    rounding of a sum can make."""
    expected_nF = x_nD.double() @ plain_FD.double().t()
    sizes_nF = x_nD.double().abs() @ plain_FD.double().abs().t()
    of_x_nF = 2**-14 * x_nD.double().abs().amax(1, keepdim=True) * plain_FD.double().abs().sum(1)
    return bool(((found_nF - expected_nF).abs() <= 2**-8 * (sizes_nF + expected_nF.abs()) + of_x_nF).all())


def _make(form: str, generator: torch.Generator) -> Sample:
    if form in ENCODINGS:
        return _make_codes(ENCODINGS[form], generator)
    if form in PLANES:
        return _make_planes(PLANES[form], generator)
    if form in RESIDUALS:
        return _make_residual(RESIDUALS[form], generator)
    if form == "ternary":
        return _make_ternary(generator)
    if form in GGUF_TYPES:
        return _make_blocks(form, generator)
    weight_FD = torch.randn(SHAPE, generator=generator).bfloat16()
    if form == "plain":
        return Sample(PLAIN, (weight_FD,), None, weight_FD)
    stored = CompressedMatrix().encode(weight_FD)
    assert stored is not None
    plain_FD = torch.empty_like(weight_FD)
    expand(stored, plain_FD)
    return Sample(COMPRESSED, (stored,), None, plain_FD)


def _make_codes(encoding: Encoding, generator: torch.Generator) -> Sample:
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
    plain_FD = decode(encoding, parts, *SHAPE, torch.bfloat16)
    return Sample(
        kernel_number(encoding), (parts["codes"], parts["scales"]), kernel_parameters(encoding, SHAPE[1]), plain_FD
    )


def _make_planes(scheme: LevelledScheme, generator: torch.Generator) -> Sample:
    base, *planes = scheme.encode(torch.randn(SHAPE, generator=generator))
    parts = [base["codes"], base["scales"], base["zeros"], None, *(joined(plane) for plane in planes)]
    plain_FD = scheme.decode([base, *planes], *SHAPE).bfloat16()
    parameter = kernel_parameters(scheme.base, SHAPE[1], is_sum=True)
    return Sample(kernel_number(scheme.base), tuple(parts), parameter, plain_FD)


def _make_residual(scheme: LevelledScheme, generator: torch.Generator) -> Sample:
    levels = []
    for level in range(scheme.levels):
        nbytes = scheme.part_bytes(level, *SHAPE)
        parts = {"codes": torch.randint(256, (nbytes["codes"],), dtype=torch.uint8, generator=generator)}
        for role in ("left", "right"):
            parts[role] = torch.rand(nbytes[role] // 2, generator=generator).bfloat16().view(torch.uint8)
        levels.append(parts)
    plain_FD = scheme.decode(levels, *SHAPE).bfloat16()
    return Sample(BLOCKS, tuple(map(joined, levels)), block_parameters(scheme.size), plain_FD)


def _make_ternary(generator: torch.Generator) -> Sample:
    """Of normal weights, about nine tenths of which lie within half of their row's extremes and become zero."""
    weight_FD = torch.randn(SHAPE, generator=generator)
    low_F, high_F = weight_FD.amin(1) / 2, weight_FD.amax(1) / 2
    sign_FD = (weight_FD > high_F[:, None]).float() - (weight_FD < low_F[:, None]).float()
    number, parts = ternary.encode(sign_FD, low_F, high_F)
    entries = torch.from_numpy(ternary.dictionary(number).view(np.uint8))
    return Sample(TERNARY, tuple(parts.values()), None, ternary.decode(number, parts, *SHAPE), (entries,))


def _make_blocks(form: str, generator: torch.Generator) -> Sample:
    count = SHAPE[0] * SHAPE[1] // BLOCK_COLUMNS[form]
    blocks = torch.randint(256, (count, GGUF_TYPES[form]), dtype=torch.uint8, generator=generator)
    for place in HALVES[form]:
        blocks[:, place : place + 2] = torch.rand(count, 1, generator=generator).half().view(torch.uint8)
    kind, plain_FD = form.upper(), torch.empty(SHAPE, dtype=torch.bfloat16)
    expand_rows(kind, blocks.view(-1), plain_FD)
    return Sample(GGUF, (blocks,), kernel_parameter(kind), plain_FD)
