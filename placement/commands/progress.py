"""A progress bar for solvers."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from ..run.budget import Progress as Tell


@contextmanager
def solving() -> Iterator[Tell]:
    """A bar on standard error that solvers move; it disappears when they are done."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("solving", total=1.0)

        def tell(phase: str, share: float) -> None:
            bar.update(task, description=phase, completed=share)

        yield tell
