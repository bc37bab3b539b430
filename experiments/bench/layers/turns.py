"""Two modules of equal operations, timed in turns."""

import statistics
from collections.abc import Callable
from typing import Any


def compared(
    module: Any, plain: Any, call: Callable[[Any], Any], backward: bool, repeats: int
) -> dict[str, float | int]:
    """Milliseconds of both, and their ratio.

    Args:
        module, plain: torch modules with gradients.
        call: the output of either, on tokens that both are given.
        backward: whether a pass goes back through the output's sum, too.
        repeats: timed passes of each.

    Returns:
        `p20_ms`, `p50_ms`, `p80_ms` of the module, `plain_ms` (median), `ratio` (median over rounds), `n`.
    """
    from ..expert_kernels.timing import time_in_turns

    calls = {name: pass_through(each, call, backward) for name, each in (("module", module), ("plain", plain))}
    samples_s = time_in_turns(calls, seconds=0.0, least=repeats)
    own_ms, plain_ms = ([1e3 * sample for sample in samples_s[name]] for name in ("module", "plain"))
    deciles = statistics.quantiles(own_ms, n=10)
    return {
        "p20_ms": deciles[1],
        "p50_ms": statistics.median(own_ms),
        "p80_ms": deciles[7],
        "n": repeats,
        "plain_ms": statistics.median(plain_ms),
        "ratio": statistics.median(a / b for a, b in zip(own_ms, plain_ms, strict=True)),
    }


def pass_through(module: Any, call: Callable[[Any], Any], backward: bool) -> Callable[[], None]:
    """One pass, with gradients of all parameters or without any."""
    import torch

    def run() -> None:
        with torch.set_grad_enabled(backward):
            y_TD = call(module)
            if backward:
                y_TD.sum().backward()
                module.zero_grad()

    return run
