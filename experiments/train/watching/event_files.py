"""TensorBoard's event files of a run, written by the package `tensorboard` where it is installed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FOLDER = "tensorboard"
CURVES = (
    *("loss", "lm_loss", "bits_per_byte", "held_out_bits_per_byte", "learning_rate", "gradient_norm"),
    *("tokens_per_second", "max_vio", "dead_experts", "router_entropy"),
)


@contextmanager
def event_files(run: Path) -> Iterator[Callable[[dict[str, Any]], None]]:
    """While this is open every step's numbers go to `<run>/tensorboard`; gives the function that is told them.

    Raises:
        ModuleNotFoundError: if the package is missing.
    """
    import tensorboard  # noqa: F401  (torch's own complaint about it does not name the package)
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(run / FOLDER)) as writer:

        def see(row: dict[str, Any]) -> None:
            for name in CURVES:
                if row.get(name) is not None:
                    writer.add_scalar(name, row[name], row["step"])
            for line in row.get("alerts", ()):
                writer.add_text("alerts", line, row["step"])

        yield see
