"""Watch: what of a run is shown while it goes on, and where."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from .page import write_run_page

See = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, kw_only=True)
class Watch:
    """What is shown.

    Args:
        live: curves in the terminal instead of a progress bar.
        page: `run.html` in the folder of the run, written anew after each evaluation and at the end.
        event_files: TensorBoard's files in the folder of the run.
    """

    live: bool = False
    page: bool = False
    event_files: bool = False

    @contextmanager
    def open(self, run: Path, total: int, done: int, *, quiet: bool) -> Iterator[See]:
        """While this is open a run is watched; gives the function that is told each step's metrics.

        Args:
            run: its folder.
            total, done: its steps, and those that were done before.
            quiet: nothing in the terminal.
        """
        with ExitStack() as stack:
            seers: list[See] = []
            if self.event_files:
                from .event_files import event_files

                seers.append(stack.enter_context(event_files(run)))
            if not quiet:
                seers.append(stack.enter_context(self._in_terminal(total, done)))
            if self.page:
                seers.append(lambda row: write_run_page(run) if "held_out_bits_per_byte" in row else None)

            def see(row: dict[str, Any]) -> None:
                for one in seers:
                    one(row)

            yield see

    def _in_terminal(self, total: int, done: int) -> Any:
        if self.live:
            from .live import live_curves

            return live_curves(total)
        return _progress_bar(total, done)

    def finish(self, run: Path) -> None:
        """Leave behind what shows the run as it ended."""
        if self.page:
            write_run_page(run)


@contextmanager
def _progress_bar(total: int, done: int) -> Iterator[See]:
    columns = (
        TextColumn("train"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}  {task.fields[text]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("train", total=total, completed=done, text="")

        def see(row: dict[str, Any]) -> None:
            text = f"{row['bits_per_byte']:.3f} bits/byte  {row['tokens_per_second']:.0f} tok/s"
            progress.update(task, advance=1, text=text)
            for line in row.get("alerts", ()):
                progress.console.print(f"step {row['step']}, {line}", style="red", highlight=False, soft_wrap=True)

        yield see
