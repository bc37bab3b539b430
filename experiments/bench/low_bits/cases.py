"""Ways to store experts that are compared, and what they are called."""

from collections.abc import Sequence
from dataclasses import dataclass

from routing.ground.expect import expect_name


@dataclass(frozen=True)
class Case:
    """One way to store experts.

    Args:
        form: what the table calls it.
        method: what quantises; `ggml` is llama.cpp's quantiser, `importance` the same with weights of the columns.
        depth: levels that are read.
        bits: stored bits of a weight that an integer programme may spend; None where the form says them.
    """

    form: str
    method: str
    depth: int | str = "all"
    bits: float | None = None

    @property
    def name(self) -> str:
        """By which `--case` finds it."""
        parts = [self.form if self.bits is None else f"{self.form}-{self.bits:g}", self.method]
        return ".".join([*parts, *([] if self.depth == "all" else [str(self.depth)])])

    @property
    def stored(self) -> str:
        """Name of what is written for it; depths of one copy share it."""
        return ".".join(self.name.split(".")[: None if self.depth == "all" else -1])

    @property
    def is_theirs(self) -> bool:
        """Whether llama.cpp's quantisers make it."""
        return self.method in ("ggml", "importance")


BY_TEXT = tuple(Case(form, method) for form in ("int4", "int3", "int2") for method in ("rtn", "hqq", "awq", "gptq"))
MIXED_BITS = (3.5, 4.5, 6.5625)
"""Between int3 and int4 with their scales, and what Q4_K and Q6_K take."""
PLANE_DEPTHS = (1, 2, 3)
"""Levels of planes: two, three and four bits."""
BLOCK_DEPTHS = (2, 3, 4, 8)
"""Residual blocks, of about a bit and a quarter each."""
CASES = (
    Case("int8", "rtn"),
    *BY_TEXT,
    *(Case("mixed", "gptq", bits=bits) for bits in MIXED_BITS),
    *(Case("planes", "levels", depth) for depth in PLANE_DEPTHS),
    *(Case("residual", "levels", depth) for depth in BLOCK_DEPTHS),
    *(Case("ternary", method) for method in ("rtn", "gptq")),
    *(Case(form, "ggml") for form in ("q8_0", "q6_k", "q4_k", "q2_k")),
    *(Case(form, "importance") for form in ("q6_k", "q4_k", "q2_k")),
)


def chosen(names: Sequence[str] | None) -> tuple[Case, ...]:
    """The cases of these names, in the order of CASES; all of them without names.

    Raises:
        ValueError: if a name is unknown.
    """
    known = {case.name: case for case in CASES}
    for name in names or ():
        expect_name(name, known, "case")
    return tuple(case for name, case in known.items() if not names or name in names)
