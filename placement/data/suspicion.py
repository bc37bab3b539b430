"""Signs that planning data are not what a plan will meet: synthetic routing, one phase, one domain.

Shapes: L layers, E experts.
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from routing.traces import RoutingTrace

Float = NDArray[np.float64]
# Mean Gini of recorded traffic: DeepSeek-R1 0.32 to 0.45 in six workloads, GPT-OSS-20B 0.39. Random tokens gave 2.35
# times as much in DODOCO (arXiv:2605.20982); an untrained router, next to nothing.
EVEN_GINI, UNEVEN_GINI = 0.12, 0.75
PHASES = ("decode", "prefill")


def gini_L(load_LE: Float) -> Float:
    """Gini coefficient of each layer's loads: 0 for equal use, near 1 where one expert gets everything."""
    ordered_LE = np.sort(load_LE, axis=1)
    E = ordered_LE.shape[1]
    total_L = ordered_LE.sum(axis=1)
    ranked_L = (ordered_LE * np.arange(1, E + 1)).sum(axis=1)
    return np.where(total_L > 0, 2 * ranked_L / np.maximum(E * total_L, 1e-300) - (E + 1) / E, 0.0)


def has_domains(traces: Iterable[RoutingTrace | None]) -> bool:
    """Whether data hold several workloads: several sets of them, or sequences of a trace."""
    found = list(traces)
    return len(found) > 1 or any(one is not None and np.ptp(one.sequence_T) > 0 for one in found)


def planning_notes(loads: dict[str, Float], *, is_broad: bool) -> list[str]:
    """One sentence for each sign.

    Args:
        loads: of each scenario, by the name of its data.
        is_broad: whether the data hold several workloads, as `has_domains` tells, or others judge the plan.
    """
    notes = []
    for name, load_LE in loads.items():
        gini = float(gini_L(load_LE).mean())
        if not EVEN_GINI <= gini <= UNEVEN_GINI:
            notes.append(
                f"{name} looks synthetic: the Gini coefficient of expert use is {gini:.2f}, of recorded traffic it was "
                "0.3 to 0.5; plans on made-up tokens do not hold"
            )
    named = [name.lower() for name in loads]
    if any("prefill" in name for name in named) and not any("decode" in name for name in named):
        notes.append(
            "every load is named prefill: plans on prefill alone served decode worst of all; add a decode load"
        )
    if not is_broad:
        notes.append("planned on one workload: on others balance may be far lower; give several --loads, or --validate")
    return notes
