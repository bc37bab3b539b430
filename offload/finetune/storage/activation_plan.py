"""Which micro-batches of which layers keep their activations, spill them to the disk, or compute them again.

Reads, writes and products overlap, so a step takes as long as the busier of disk and processor. A unit that is spilled
adds to the disk's seconds, one that is computed again to the processor's. So each goes to whichever is done earlier
with it: transfers hide behind products, and products behind transfers.

Source: Zhao et al. 2024 (MEMO), arXiv:2407.12117, section 4.1: the share of a layer's tokens that is swapped is as
large as its products hide and the memory holds. There tokens are split freely and all layers alike; here whole
micro-batches are, because the same product over fewer rows has other bits.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from .units import Choice


@dataclass(frozen=True)
class UnitCost:
    """What a micro-batch in a layer costs.

    Args:
        nbytes: of what autograd keeps of it.
        held_bytes: that stay where it is computed again: what goes into the layer, and what its experts give.
        rerun_s: seconds of computing it again.
    """

    nbytes: float
    held_bytes: float
    rerun_s: float


@dataclass(frozen=True)
class StepLoad:
    """A step that keeps everything.

    Args:
        disk_s, compute_s: how long disk and processor are busy.
        disk_bytes_per_s: at which activations are written and read.
    """

    disk_s: float
    compute_s: float
    disk_bytes_per_s: float

    def with_choices(self, units: Sequence[UnitCost], choices: Sequence[Choice]) -> "StepLoad":
        """The step with what was chosen for its units."""
        pairs = list(zip(units, choices, strict=True))
        moved = sum(2 * unit.nbytes for unit, choice in pairs if choice == "spilled")
        again_s = sum(unit.rerun_s for unit, choice in pairs if choice == "recomputed")
        return StepLoad(self.disk_s + moved / self.disk_bytes_per_s, self.compute_s + again_s, self.disk_bytes_per_s)

    @property
    def seconds(self) -> float:
        """Of the step."""
        return max(self.disk_s, self.compute_s)


def choose(units: Sequence[UnitCost], other_bytes: float, limit_bytes: float, load: StepLoad) -> list[Choice]:
    """What becomes of each unit.

    The first ones leave memory, the last ones stay: those come back first, and the disk has more time for the others.

    Args:
        units: in the order of the forward pass.
        other_bytes: kept outside units.
        limit_bytes: of all that is kept.
        load: of a step that keeps everything.
    """
    excess = other_bytes + sum(unit.nbytes for unit in units) - limit_bytes
    choices: list[Choice] = []
    disk_s, compute_s = load.disk_s, load.compute_s
    for unit in units:
        spilled_s, rerun_s = disk_s + 2 * unit.nbytes / load.disk_bytes_per_s, compute_s + unit.rerun_s
        if excess <= 0:
            choices.append("kept")
        elif unit.held_bytes >= unit.nbytes or max(spilled_s, compute_s) <= max(rerun_s, disk_s):
            choices.append("spilled")
            disk_s, excess = spilled_s, excess - unit.nbytes
        else:
            choices.append("recomputed")
            compute_s, excess = rerun_s, excess - (unit.nbytes - unit.held_bytes)
    return choices
