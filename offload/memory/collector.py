"""Python's collector of circular references, and objects that stay."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def what_stays_left_out() -> Iterator[None]:
    """Within, the collector does not look at objects that are there already.

    A model, its layers and every module that was imported are a million objects. The collector goes through them
    several times in a step, and no other thread runs meanwhile: those that read from the disk do not go on either.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
