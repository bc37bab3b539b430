"""Layout: over how many processes a model is split, and along which axes."""

from dataclasses import dataclass
from typing import Self

AXES = ("data", "expert")
BY_TIME = "auto"
"""Instead of axes: the step's expert degree follows from measured times; see `degrees`."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The processes of a run as a grid of `data` x `expert`.

    Every process has micro-batches of its own, and everything but the experts is split over all of them (FSDP). The
    experts of a layer are split over the `expert` processes of a row; the rows hold the same experts, split once more.

    Args:
        data: rows, at least 1.
        expert: processes of a row, at least 1; divides E.
        by_time: experts are split over all processes, and how they are reached may change between steps; `data` is 1.

    Raises:
        ValueError: if a size is not positive.
    """

    data: int = 1
    expert: int = 1
    by_time: bool = False

    def __post_init__(self) -> None:
        if min(self.data, self.expert) < 1:
            raise ValueError(f"axes must be at least 1; got data={self.data}, expert={self.expert}")

    @property
    def processes(self) -> int:
        """All processes of the grid."""
        return self.data * self.expert

    @classmethod
    def parse(cls, text: str | None, processes: int) -> Self:
        """The layout of so many processes.

        Args:
            text: axes such as `data=2,expert=2`; without `data` it is what is left over. None splits no experts; `auto`
                splits them over all processes, for degrees that follow from measured times.
            processes: how many there are, 1 or more.

        Raises:
            ValueError: if the text does not read so, or its axes do not multiply to the number of processes.
        """
        if text == BY_TIME:
            return cls(expert=processes, by_time=True)
        sizes: dict[str, int] = {}
        for part in (text or "").split(",") if text else ():
            axis, _, size = part.strip().partition("=")
            if axis not in AXES or not size.isdecimal() or axis in sizes:
                raise ValueError(
                    f"--parallel reads like data=2,expert=2 with axes {', '.join(AXES)}, or {BY_TIME}; got {text!r}"
                )
            sizes[axis] = int(size)
        expert = sizes.get("expert", 1)
        if "data" not in sizes and expert and processes % expert == 0:
            sizes["data"] = processes // expert
        layout = cls(**sizes)
        if layout.processes != processes:
            raise ValueError(
                f"data={layout.data} x expert={layout.expert} are {layout.processes} processes, but there are "
                f"{processes}; start {layout.processes}, or change --parallel"
            )
        return layout
