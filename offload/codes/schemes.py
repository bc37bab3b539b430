"""Schemes: the forms that we quantise to, what a code and a scale are in each, and how both become stored parts.

Most are symmetric: a weight is code times scale. Integers have one code more below zero than above, so the scale has
the sign that lets this code be the weight farthest from zero. Integers with a zero are (code - zero) times scale: the
zero is a code where codes have four bits or more, and any number where there are so few codes that it matters.
"""

import re
from dataclasses import dataclass
from functools import cached_property

import torch

from .bits import pack_bits
from .decode import E2M1, SCALE_DTYPES
from .encoding import Encoding
from .stored_matrix import StoredMatrix

NAME = re.compile(r"(int[2348]|mxfp4|fp8)(z?)(?:-(\d{1,6}))?")
FORMS = ("int8", "int4", "int3", "int2", "mxfp4", "fp8")
MX_COLUMNS = 32
"""Columns that share an exponent, by the OCP standard of microscaling formats."""
E4M3_MOST = 448.0
"""The largest number of E4M3, by the OCP standard of 8-bit floats."""
LEAST_GROUP = 16
"""Columns below which groups are not divided: scales would take half a byte of every weight."""


@dataclass(frozen=True)
class Scheme:
    """A form with its group.

    Args:
        form: one of FORMS.
        group: columns that share a scale; 0 is a whole row.
        has_zero: whether integers have a zero for each group.
    """

    form: str
    group: int = 0
    has_zero: bool = False

    @classmethod
    def named(cls, name: str) -> "Scheme":
        """The scheme that `name` tells.

        Raises:
            ValueError: if none does.
        """
        found = NAME.fullmatch(name)
        if found is None or (found[2] and not found[1].startswith("int")):
            raise ValueError(f"{name!r} names no scheme; expected int2, int3, int4 or int8 and a group, mxfp4 or fp8")
        return cls(found[1], MX_COLUMNS if found[1] == "mxfp4" else int(found[3] or 0), bool(found[2]))

    @classmethod
    def for_columns(cls, form: str, columns: int, wanted: int, *, has_zero: bool = False) -> "Scheme":
        """The scheme of a form for a matrix.

        Args:
            form: one of FORMS.
            columns: of the matrix, 1 or more.
            wanted: columns that should share a scale; halved until it divides the columns, else a whole row.
            has_zero: give integers zeros.

        Raises:
            ValueError: if the form has a group of its own, and that does not divide the columns.
        """
        if form == "fp8":
            return cls(form)
        if form == "mxfp4":
            if columns % MX_COLUMNS:
                raise ValueError(f"mxfp4 needs a multiple of {MX_COLUMNS} columns; got {columns}")
            return cls(form, MX_COLUMNS)
        while wanted >= LEAST_GROUP and columns % wanted:
            wanted //= 2
        return cls(form, wanted if wanted >= LEAST_GROUP else 0, has_zero)

    @property
    def name(self) -> str:
        """By which `named` finds it."""
        form = f"{self.form}z" if self.has_zero else self.form
        return f"{form}-{self.group}" if self.is_integer and self.group else form

    @property
    def is_integer(self) -> bool:
        """Whether codes are integers, whose scale can be fitted freely."""
        return self.form.startswith("int")

    @property
    def bits(self) -> int:
        """Of a code."""
        return {"mxfp4": 4, "fp8": 8}.get(self.form) or int(self.form[-1])

    def encoding(self, dtype: str) -> Encoding:
        """What the stored bytes mean.

        Args:
            dtype: safetensors name of the model's dtype, which scales of integers and of fp8 have.
        """
        if self.form == "mxfp4":
            return Encoding(codes="e2m1", group_rows=1, group_columns=MX_COLUMNS, scale="EXP2", product="BF16")
        codes = "e4m3" if self.form == "fp8" else f"offset{self.bits}"
        return Encoding(
            codes=codes,
            group_rows=1,
            group_columns=self.group,
            scale=dtype,
            # a zero that is no code makes a difference that the scale's dtype may not hold
            product="F32" if self.has_zero and not self.rounds_zero else dtype,
            zero=("bytes" if self.rounds_zero else "floats") if self.has_zero else "none",
            is_word_aligned=self.is_integer,
        )

    @property
    def rounds_zero(self) -> bool:
        """Whether zeros are codes, as our C and other engines know them."""
        return self.bits >= 4

    @cached_property
    def most(self) -> float:
        """The code that is farthest from zero, as a distance."""
        return {"mxfp4": max(E2M1), "fp8": E4M3_MOST}.get(self.form) or float(1 << (self.bits - 1))

    def scale_of(self, w_RGC: torch.Tensor, dtype: str) -> torch.Tensor:
        """Scales that reach the weight farthest from zero in each group.

        Args:
            w_RGC: rows, groups and columns of a group, float32.
            dtype: that scales are rounded to.

        Returns:
            `[R, G]`, float32.
        """
        if self.is_integer:
            least_RG, most_RG = w_RGC.amin(-1), w_RGC.amax(-1)
            farthest_RG = torch.where(-least_RG >= most_RG, least_RG, most_RG)
            return self.rounded_scale(-farthest_RG / self.most, dtype)
        farthest_RG = w_RGC.abs().amax(-1)
        if self.form == "mxfp4":
            # by the standard: the exponent of the farthest weight, less that of the farthest code, which is 4 to 6
            exponent_RG = torch.floor(torch.log2(farthest_RG.clamp_min(2.0**-120))) - 2
            return torch.exp2(exponent_RG.clamp(-126, 127))
        return self.rounded_scale(farthest_RG / self.most, dtype)

    def rounded_scale(self, scale: torch.Tensor, dtype: str) -> torch.Tensor:
        """Scales as they are stored, float32 again; 1 where all weights are zero."""
        if self.form == "mxfp4":
            return scale
        rounded = scale.to(SCALE_DTYPES[dtype]).float()
        return torch.where(rounded == 0, torch.ones_like(rounded), rounded)

    def numbers(self, w: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | float = 0.0) -> torch.Tensor:
        """The values of the nearest codes, float32; `scale` and `zero` are broadcast."""
        x = w / scale + zero
        if self.is_integer:
            return x.round().clamp(-self.most, self.most - 1)
        if self.form == "fp8":
            return x.clamp(-self.most, self.most).to(torch.float8_e4m3fn).float()
        size = x.abs().clamp_max(self.most)
        # codes are 0, .5, 1, 1.5 | 2, 3 | 4, 6: three distances, each rounded to even by `round`
        step = torch.where(size < 1.75, 0.5, torch.where(size < 3.5, 1.0, 2.0))
        return torch.copysign((size / step).round() * step, x)

    def stored(
        self, number_RC: torch.Tensor, scale_RG: torch.Tensor, dtype: str, zero_RG: torch.Tensor | None = None
    ) -> StoredMatrix:
        """A matrix of code values and scales, as it is stored.

        Args:
            number_RC: values of `numbers`.
            scale_RG: values of `rounded_scale`.
            dtype: safetensors name of the dtype that scales have.
            zero_RG: in the units of the code values, where the scheme has zeros.
        """
        rows, columns = number_RC.shape
        encoding = self.encoding(dtype)
        parts = {"codes": self._codes(number_RC, encoding).reshape(-1)}
        if self.form == "mxfp4":
            parts["scales"] = (torch.log2(scale_RG) + 127).to(torch.uint8).reshape(-1)
        else:
            parts["scales"] = scale_RG.to(SCALE_DTYPES[dtype]).contiguous().reshape(-1).view(torch.uint8)
        if zero_RG is not None:
            as_bytes = (zero_RG + self.most).to(torch.uint8)
            as_floats = zero_RG.to(SCALE_DTYPES[dtype]).contiguous().reshape(-1).view(torch.uint8)
            parts["zeros"] = as_bytes.reshape(-1) if self.rounds_zero else as_floats
        return StoredMatrix(encoding=encoding, rows=rows, columns=columns, parts=parts)

    def _codes(self, number_RC: torch.Tensor, encoding: Encoding) -> torch.Tensor:
        if self.form == "fp8":
            return number_RC.to(torch.float8_e4m3fn).contiguous().view(torch.uint8)
        if self.form == "mxfp4":
            values = torch.tensor(E2M1[:8])
            sign_RC = torch.signbit(number_RC).to(torch.uint8) << 3
            code_RC = torch.bucketize(number_RC.abs(), values).to(torch.uint8) | sign_RC
        else:
            code_RC = (number_RC + self.most).to(torch.uint8)
        return pack_bits(code_RC, self.bits, encoding.row_bytes(number_RC.shape[1]))

    def grouped(self, w_RC: torch.Tensor) -> torch.Tensor:
        """Rows, groups and columns of a group; the columns are a multiple of the group."""
        return w_RC.view(w_RC.shape[0], -1, self.group or w_RC.shape[1])
