"""What becomes of an expert's first product, as tables: the activation, and what the linear part goes through.

A gate of bfloat16 numbers that is a product of two functions, one of each part, is two tables of 65,536 results. Both
are made by the gate itself: where one function is a power of two, the other is what is left.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from .routed_rows import VECTOR_ELEMENTS

ALL_BFLOAT16 = 1 << 16
"""How many numbers bfloat16 has; a table of results for each takes 128 KiB."""
TRIED_ROWS = 8
"""Rows of random numbers that show whether tables say all: a gate that looks at its neighbours, or is no product,
differs from them in every row."""
NEUTRAL = (1.0, 0.0)
"""Linear parts whose function may be 1: that of a plain product, and that of gates that add 1."""
POWERS = (1.0, 2.0, 0.5, 4.0, 0.25, 8.0)
"""Powers of two that the activation may have; with 1 nothing can overflow."""

_TABLES: dict[bytes, torch.Tensor] = {}
"""Every table in use, by the digest of its results: one for each activation."""

Apply = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Gating:
    """A gate as tables.

    Args:
        gate: result of the activation for each bfloat16 number, in the order of their bits.
        linear: the same for the linear part; None if it stays as it is.
        is_gated: whether there is a linear part.
        is_interleaved: whether the parts are even and odd outputs of the first product, not its two halves.
    """

    gate: torch.Tensor
    linear: torch.Tensor | None = None
    is_gated: bool = True
    is_interleaved: bool = False

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """What the gate gives for outputs of the first product, `[n, 2 F]` or `[n, F]`."""
        if not self.is_gated:
            return _look_up(self.gate, rows)
        gate, linear = (rows[..., ::2], rows[..., 1::2]) if self.is_interleaved else rows.chunk(2, dim=-1)
        return _look_up(self.gate, gate) * (linear if self.linear is None else _look_up(self.linear, linear))


def find_gating(module: Any, width: int) -> Gating | None:
    """The gate of an experts module as tables; None if it is no product of functions of single numbers.

    Args:
        module: the experts module.
        width: F, the numbers that the gate gives for a row.
    """
    apply: Apply = module._apply_gate if module.has_gate else module.act_fn
    candidates = _gates(apply) if module.has_gate else iter([_activation(apply)])
    found = next((found for found in candidates if found is not None and _agrees(found, apply, width)), None)
    return None if found is None else replace(found, gate=_one_of_equal(found.gate))


def _one_of_equal(table: torch.Tensor) -> torch.Tensor:
    """The first of equal tables; a layer with one of its own would push those of others out of the caches."""
    key = hashlib.blake2b(table.view(torch.int16).numpy().tobytes()).digest()
    if key not in _TABLES:
        with torch.inference_mode(False):  # whoever is the first: tensors of inference mode are of use there alone
            _TABLES[key] = table.clone()
    return _TABLES[key]


@dataclass(frozen=True)
class Slopes:
    """Derivatives of a gate's two functions for each bfloat16 number, in float32; `linear` as in `Gating`."""

    gate: torch.Tensor
    linear: torch.Tensor | None = None


def find_slopes(module: Any, gating: Gating) -> Slopes:
    """The derivatives of a gate whose tables are known: by the gate's own gradient, in float32."""
    apply: Apply = module._apply_gate if module.has_gate else module.act_fn
    if not gating.is_gated:
        return Slopes(_gradient(apply, _every().float()))
    neutral = 1.0 if gating.linear is None else float(_every()[(gating.linear == 1).nonzero()[0]])
    gate, _ = _gradients(apply, _every().float(), neutral, gating.is_interleaved)
    if gating.linear is None:
        return Slopes(gate)
    power = _power_of_two(gating.gate)
    assert power is not None
    factor, value = power
    _, linear = _gradients(apply, value, _every().float(), gating.is_interleaved)
    return Slopes(gate, linear / factor)


def _gradients(
    apply: Apply, gate: torch.Tensor | float, linear: torch.Tensor | float, is_interleaved: bool
) -> torch.Tensor:
    """Of a gate with respect to both parts, one of which is the same number everywhere."""
    parts = [part if isinstance(part, torch.Tensor) else torch.full((ALL_BFLOAT16,), part) for part in (gate, linear)]
    found = _gradient(apply, _joined(*parts, is_interleaved))[0]
    return found.view(-1, 2).t() if is_interleaved else found.view(2, -1)


def _gradient(apply: Apply, numbers: torch.Tensor) -> torch.Tensor:
    with torch.enable_grad():
        given = numbers.requires_grad_()
        return torch.autograd.grad(apply(given).sum(), given)[0]


def _activation(apply: Apply) -> Gating | None:
    table = apply(_every())
    return Gating(table, is_gated=False) if _is_table(table) else None


def _gates(apply: Apply) -> Iterator[Gating | None]:
    for is_interleaved in (False, True):
        for neutral in NEUTRAL:
            every = _every()
            gate = apply(_joined(every, torch.full_like(every, neutral), is_interleaved))[0]
            if not _is_table(gate) or (power := _power_of_two(gate)) is None:
                continue
            factor, value = power
            linear = apply(_joined(torch.full_like(every, value), every, is_interleaved))[0] / factor
            is_same = torch.equal(linear.nan_to_num(), every.nan_to_num())
            yield Gating(gate, None if is_same else linear, is_interleaved=is_interleaved)


def _every() -> torch.Tensor:
    """Every bfloat16 number, in the order of their bits."""
    return torch.arange(ALL_BFLOAT16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


def _joined(gate: torch.Tensor, linear: torch.Tensor, is_interleaved: bool) -> torch.Tensor:
    """Both parts as the outputs of one row."""
    return torch.stack([gate, linear], dim=1).view(1, -1) if is_interleaved else torch.cat([gate, linear]).view(1, -1)


def _is_table(table: torch.Tensor) -> bool:
    return table.shape == (ALL_BFLOAT16,) and table.dtype == torch.bfloat16


def _power_of_two(table: torch.Tensor) -> tuple[float, float] | None:
    """A power of two that a table has, and the number that it has it for."""
    for power in POWERS:
        found = (table == power).nonzero()
        if len(found):
            return power, float(_every()[found[0]])
    return None


def _agrees(found: Gating, apply: Apply, width: int) -> bool:
    # whole vectors only: their remainder goes through another routine, whose last bits can differ
    columns = -(-width // VECTOR_ELEMENTS) * VECTOR_ELEMENTS * (2 if found.is_gated else 1)
    tried = torch.randn(TRIED_ROWS, columns, generator=torch.Generator().manual_seed(0)).mul_(8).bfloat16()
    return torch.equal(found(tried), apply(tried))


def _look_up(table: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    return table[numbers.contiguous().view(torch.int16).long() & (ALL_BFLOAT16 - 1)]
