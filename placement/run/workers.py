"""Independent jobs in worker processes; a single process stays where it is."""

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")


def in_workers(run: Callable[[Job], Result], jobs: Iterator[Job], processes: int) -> Iterator[Result]:
    """Results in the order of the jobs. Who stops listening, as by Ctrl-C, drops the jobs that have not begun.

    Args:
        run: a function of a module, so that worker processes find it.
        jobs: picklable values.
        processes: how many at a time; 1 runs them here.
    """
    if processes == 1:
        yield from map(run, jobs)
        return
    pool = ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("forkserver"))
    try:
        yield from pool.map(run, jobs)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
