"""What `expertier fit --batch` prints: tokens per second of each batch within one budget, and the best one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from routing.ground.hardware import Hardware
from routing.ground.quantity import format_size
from routing.ground.terminal import plain_console
from routing.traces import RoutingTrace


def read_batches(text: str) -> list[int]:
    """The numbers of a text such as `1,4,16`.

    Raises:
        ValueError: if a part is no whole number from 1 on.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) >= 1 for part in parts):
        raise ValueError(f"--batch takes whole numbers from 1 on with commas between them; got {text!r}")
    return [int(part) for part in parts]


def fit_batches(
    model: str, trace: RoutingTrace, rates: Hardware, batches: Sequence[int], context: int, chunk: int, **options: Any
) -> list[dict[str, Any]]:
    """Predict each batch, print a line for it and which is best; gives them as JSON.

    Args:
        model: a model folder or id.
        trace: recorded routing of it.
        rates: of this machine, for one row. What several rows cost is measured here.
        batches: numbers of sequences.
        context: tokens that each sequence may come to.
        chunk: tokens of a prompt that each step reads beside them.
        options: of `fit`.
    """
    from ..forecast.batches import best_batch, forecast_batches, step_rows
    from ..forecast.steps import measure_step_rates

    console = plain_console(soft_wrap=True)
    with plain_console(stderr=True).status("measuring products of several rows on this machine"):
        measured = measure_step_rates(Path(), rates, step_rows(batches, chunk))
    found = forecast_batches(model, trace, measured, batches, context=context, chunk=chunk, **options)
    table = Table("sequences", "keys and values", "slots per layer", "hit rate", "step", "of it attention", "tok/s")
    for one in found:
        table.add_row(str(one.batch), format_size(one.kv_bytes), *_cells(one))
    console.print(table)
    if (best := best_batch(found)) is None:
        console.print(f"none of these batches fits: {found[0].reason}", highlight=False, markup=False)
    else:
        beside = f" and {chunk} tokens of a prompt" if chunk else ""
        console.print(
            f"most tokens per second: {best.batch} sequences{beside} a step, {_slots(best.num_slots)} slots per layer, "
            f"{best.tokens_per_second:.2f} tok/s"
        )
    return [one.as_json() for one in found]


def _cells(one: Any) -> list[str]:
    if not one.num_slots:
        return ["does not fit", "-", "-", "-", "-"]
    speeds = [f"{one.hit_rate:.1%}", f"{one.step_s:.3g} s", f"{one.attention_s:.2g} s", f"{one.tokens_per_second:.2f}"]
    return [_slots(one.num_slots), *speeds]


def _slots(num_slots: Sequence[int]) -> str:
    return f"{min(num_slots)}" if min(num_slots) == max(num_slots) else f"{min(num_slots)} to {max(num_slots)}"
