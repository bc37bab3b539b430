"""Codes in levels: the first levels of a matrix are a coarser matrix, and each further one makes it finer.

- `planes` (D2MoE, arXiv:2504.15299): two bits with a zero, then planes of signs, each times a scale of its own.
- `residual` (BitStack, arXiv:2410.23918): blocks of signs, each times a matrix of few ranks, of what the blocks before
  have left over.

Shapes: R rows (outputs), C columns (inputs), G groups of columns, X columns of a group, r ranks.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from .bits import pack_bits, unpack_bits
from .decode import decode
from .encoding import Encoding
from .schemes import Scheme

NAME = re.compile(r"(planes|residual)-(\d{1,5})x(\d{1,2})")
BASE_BITS = 2
"""Bits of the first level of planes, as in D2MoE."""
LevelParts = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class LevelledScheme:
    """One kind of levels.

    Args:
        kind: `planes` or `residual`.
        size: columns that share a scale, or ranks of a block.
        levels: how many there are; planes begin with two bits and add one with each level.
    """

    kind: str
    size: int
    levels: int

    @classmethod
    def named(cls, name: str) -> "LevelledScheme":
        """The scheme that `name` tells.

        Raises:
            ValueError: if none does.
        """
        found = NAME.fullmatch(name)
        if found is None or not (int(found[2]) and int(found[3])):
            raise ValueError(f"{name!r} names no levels; expected planes-GROUPxLEVELS or residual-RANKxLEVELS")
        return cls(found[1], int(found[2]), int(found[3]))

    @property
    def name(self) -> str:
        """By which `named` finds it."""
        return f"{self.kind}-{self.size}x{self.levels}"

    def part_bytes(self, level: int, rows: int, columns: int) -> dict[str, int]:
        """Bytes of each part of a level, by role."""
        signs = rows * -(-columns // 8)
        if self.kind == "residual":
            return {"codes": signs, "left": 2 * rows * self.size, "right": 2 * self.size * columns}
        groups = rows * -(-columns // self.size)
        if level == 0:
            return dict(self.base.part_bytes(rows, columns))
        return {"codes": signs, "scales": 2 * groups}

    def encode(self, w_RC: torch.Tensor) -> list[dict[str, torch.Tensor]]:
        """The parts of every level of a matrix, uint8."""
        return self._blocks(w_RC) if self.kind == "residual" else self._planes(w_RC)

    def decode(self, levels: Sequence[LevelParts], rows: int, columns: int) -> torch.Tensor:
        """The matrix that some first levels stand for, `[R, C]` float32."""
        w_RC = torch.zeros(rows, columns)
        for level, parts in enumerate(levels):
            if self.kind == "planes" and level == 0:
                w_RC += decode(self.base, parts, rows, columns, torch.float32)
            else:
                w_RC += _signs(parts["codes"], rows, columns) * self._sizes(parts, rows, columns)
        return w_RC

    @cached_property
    def base(self) -> Encoding:
        """What the first level of planes means."""
        return self._base.encoding("BF16")

    @property
    def _base(self) -> Scheme:
        return Scheme(f"int{BASE_BITS}", self.size, has_zero=True)

    def _sizes(self, parts: LevelParts, rows: int, columns: int) -> torch.Tensor:
        """What the signs of a level are multiplied with."""
        if self.kind == "residual":
            left_Rr = _floats(parts["left"]).view(rows, self.size)
            right_rC = _floats(parts["right"]).view(self.size, columns)
            # one rank after the other, since a product of matrices adds in an order of its own; our C has this one
            size_RC = torch.zeros(rows, columns)
            for rank in range(self.size):
                size_RC += left_Rr[:, rank, None] * right_rC[rank]
            return size_RC
        return _floats(parts["scales"]).view(rows, -1).repeat_interleave(self.size, dim=1)[:, :columns]

    def _planes(self, w_RC: torch.Tensor) -> list[dict[str, torch.Tensor]]:
        rows, columns = w_RC.shape
        levels = [dict(_two_bits(w_RC, self._base))]
        while len(levels) < self.levels:
            left_RC = w_RC - self.decode(levels, rows, columns)
            # the scale of least squares for signs: the mean of what is left over
            scale_RG = left_RC.abs().view(rows, -1, self.size).mean(-1)
            levels.append({"codes": _sign_bytes(left_RC), "scales": _bytes(scale_RG)})
        return levels

    def _blocks(self, w_RC: torch.Tensor) -> list[dict[str, torch.Tensor]]:
        rows, columns = w_RC.shape
        levels: list[dict[str, torch.Tensor]] = []
        left_RC = w_RC
        for _ in range(self.levels):
            left_Rr, right_rC = _few_ranks(left_RC.abs(), self.size)
            levels.append({"codes": _sign_bytes(left_RC), "left": _bytes(left_Rr), "right": _bytes(right_rC)})
            left_RC = left_RC - self.decode(levels[-1:], rows, columns)
        return levels


def _few_ranks(w_RC: torch.Tensor, ranks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest matrix of so many ranks as a product `[R, r] @ [r, C]`, each factor with the root of the sizes.

    By the eigenvectors of the smaller of the two squares: a fraction of the time of a decomposition of the whole.
    """
    if w_RC.shape[0] < w_RC.shape[1]:
        left_Rr, right_rC = _few_ranks(w_RC.t(), ranks)
        return right_rC.t(), left_Rr.t()
    square_C, v_CC = torch.linalg.eigh(w_RC.t() @ w_RC)
    v_Cr = v_CC[:, -ranks:].flip(1)
    root_r = square_C[-ranks:].flip(0).clamp_min(1e-30).sqrt().sqrt()
    return w_RC @ (v_Cr / root_r), (v_Cr * root_r).t()


def _two_bits(w_RC: torch.Tensor, scheme: Scheme) -> LevelParts:
    """Two bits with a zero: scale and zero by least squares on alternating codes, from the range of each group.

    Sources: D2MoE's equation for the base; Lloyd's alternation for its scale and zero.
    """
    w_RGX = scheme.grouped(w_RC)
    least_RG, largest_RG = w_RGX.amin(-1), w_RGX.amax(-1)
    scale_RG = scheme.rounded_scale((largest_RG - least_RG) / (2 * scheme.most - 1), "BF16")
    zero_RG = -scheme.most - least_RG / scale_RG
    for _ in range(10):
        number_RGX = scheme.numbers(w_RGX, scale_RG[..., None], zero_RG[..., None])
        middle_RG, mean_RG = number_RGX.mean(-1), w_RGX.mean(-1)
        apart_RGX = number_RGX - middle_RG[..., None]
        spread_RG = apart_RGX.square().sum(-1)
        slope_RG = (apart_RGX * w_RGX).sum(-1) / spread_RG.clamp_min(1e-12)
        scale_RG = torch.where((spread_RG > 0) & (slope_RG > 0), slope_RG, scale_RG)
        scale_RG = scheme.rounded_scale(scale_RG, "BF16")
        zero_RG = (middle_RG - mean_RG / scale_RG).bfloat16().float()
    number_RGX = scheme.numbers(w_RGX, scale_RG[..., None], zero_RG[..., None])
    return scheme.stored(number_RGX.view_as(w_RC), scale_RG, "BF16", zero_RG).parts


def _sign_bytes(left_RC: torch.Tensor) -> torch.Tensor:
    """A bit for each weight, 1 where it is not negative; rows are whole bytes."""
    return pack_bits((left_RC >= 0).to(torch.uint8), 1, -(-left_RC.shape[1] // 8)).reshape(-1)


def _signs(codes: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    return 2.0 * unpack_bits(codes.view(rows, -1), 1, columns) - 1


def _bytes(values: torch.Tensor) -> torch.Tensor:
    return values.bfloat16().contiguous().reshape(-1).view(torch.uint8)


def _floats(part: torch.Tensor) -> torch.Tensor:
    # a clone, because a part may begin at any byte of a slot
    return part.clone().view(torch.bfloat16).float()
