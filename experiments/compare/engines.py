"""Who executes the runs of a comparison: processes of this machine, or the machines of a Ray cluster."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import active_children, get_context, parent_process
from threading import Thread
from typing import Any

from routing.ground.expect import expect_name

from .runs import Run, execute_one, expect_same

Done = Callable[[Run, dict[str, Any]], None]
Ended = Iterator[tuple[Run, dict[str, Any]]]
ATTEMPTS = 3
"""Times that Ray starts a run whose process or machine dies; each goes on after the last checkpoint."""


def execute(runs: list[Run], processes: int, done: Done, engine: str = "local") -> None:
    """Finish every run that has no result yet; one that fails does not stop the others.

    Args:
        runs: as planned.
        processes: how many at a time on one machine, sharing its cores.
        done: called with each run and its result as it ends.
        engine: a key of `ENGINES`.

    Raises:
        ValueError: if a folder holds a run with other settings, or the engine is unknown or not installed.
    """
    expect_name(engine, ENGINES, "engine")
    for run in runs:
        expect_same(run)
    found = [(run, run.result) for run in runs]
    for run, result in found:
        if result is not None:
            done(run, result)
    for run, result in ENGINES[engine]([run for run, result in found if result is None], processes):
        done(run, result)


def local(runs: list[Run], processes: int) -> Ended:
    """One after the other in this process, or several at a time in processes of their own."""
    if processes == 1:
        for run in runs:
            yield run, execute_one(run, threads=None)
        return
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=_follow_parent) as pool:
        futures = {pool.submit(_work, run, _threads(processes)): run for run in runs}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except (KeyboardInterrupt, GeneratorExit):
            for future in futures:
                future.cancel()
            for worker in active_children():
                worker.terminate()  # SIGINT is ignored where a script has started all this in the background
            raise


def by_ray(runs: list[Run], processes: int) -> Ended:
    """Tasks of the cluster that `RAY_ADDRESS` or a running node names, else of one that is started on this machine.

    Every machine needs this package, and sees the folders and the text under the same paths.

    Raises:
        ValueError: if Ray is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise ValueError("the engine ray needs Ray; install expertier[ray], or take the engine local") from error
    ray.init(log_to_driver=False, configure_logging=False)
    threads = _threads(processes)
    start = ray.remote(num_cpus=threads, max_retries=ATTEMPTS - 1)(_execute_in)
    waiting = {start.remote(os.getcwd(), run, threads): run for run in runs}
    try:
        while waiting:
            (ended, *_), _ = ray.wait(list(waiting))
            run = waiting.pop(ended)
            try:
                result = ray.get(ended)
            except ray.exceptions.RayError as error:
                reason = str(error).strip().splitlines()[-1]
                message = f"Ray gave it up after at most {ATTEMPTS} attempts: {type(error).__name__}: {reason}"
                result = {"variant": run.variant, "seed": run.config.seed, "status": "failed", "message": message}
            yield run, result
    finally:
        for task in waiting:
            ray.cancel(task)
        ray.shutdown()


ENGINES: dict[str, Callable[[list[Run], int], Ended]] = {"local": local, "ray": by_ray}


def _execute_in(folder: str, run: Run, threads: int) -> dict[str, Any]:
    """What `execute_one` does, where relative paths mean what they mean to the process that asks."""
    os.chdir(folder)
    return execute_one(run, threads)


def _work(run: Run, threads: int) -> dict[str, Any]:
    """What `execute_one` does; an interrupt ends the process, which its pool would hand the next run."""
    try:
        return execute_one(run, threads)
    except KeyboardInterrupt:
        os._exit(1)


def _threads(processes: int) -> int:
    return max(1, (os.cpu_count() or 1) // processes)


def _follow_parent() -> None:
    """Make a worker die with the process that started it: two processes must never train in one folder.

    It leaves the terminal's group, because Ctrl-C is passed on by that process, and a second one would end it at once.
    """
    os.setpgid(0, 0)

    def watch() -> None:
        parent = parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    Thread(target=watch, daemon=True).start()
