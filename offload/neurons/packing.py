"""Writes the bundle of a model in a folder."""

from collections.abc import Callable
from pathlib import Path

from ..checkpoint.model_folder import local_folder, sketch_of
from .bundle import expect_replaceable, write_bundle
from .feed_forwards import find_feed_forwards


def pack_units(
    path_or_id: str | Path, out: Path, progress: Callable[[int, int], None] = lambda done, total: None
) -> None:
    """Copy the feed-forwards of a dense model into one file, by hidden units.

    Args:
        path_or_id: a model folder, or a model id.
        out: the file; it appears when it is whole.
        progress: told how many parts are done, and how many there are.

    Raises:
        ValueError: if units that are not active are not exactly zero, weights are not stored plainly, or `out` is there
            and no bundle.
    """
    expect_replaceable(out)
    sketch, entries = sketch_of(local_folder(path_or_id), "auto", needs_experts=False)
    write_bundle(out, find_feed_forwards(sketch.skeleton, entries, sketch.found), progress)
