"""Which units of a model can come from a bundle, and the bundle of a model in a folder."""

from collections.abc import Callable, Mapping, Sequence
from glob import escape
from pathlib import Path

from ..checkpoint.experts import ExpertLayer
from ..checkpoint.model_folder import Sketch, local_folder, sketch_of
from ..checkpoint.plain_weights import expect_plain_weights
from ..checkpoint.tensors import TensorEntry
from .bundle import expect_replaceable, write_bundle
from .expert_banks import find_expert_banks
from .feed_forwards import find_feed_forwards
from .unit_layer import UnitLayer


def find_units(
    sketch: Sketch, entries: Mapping[str, TensorEntry], layers: Sequence[ExpertLayer]
) -> tuple[UnitLayer, ...]:
    """The experts of a mixture, or the feed-forwards of a dense model; dense ones of a mixture stay in memory.

    Args:
        sketch: the model before its weights.
        entries: the checkpoint's tensors.
        layers: where its experts lie; none in a dense model.

    Raises:
        ValueError: if units that are not active are not exactly zero, or weights are not stored plainly.
    """
    if layers:
        return find_expert_banks(sketch.skeleton, layers)
    return find_feed_forwards(sketch.skeleton, entries, sketch.found)


def pack_units(
    path_or_id: str | Path, out: Path, progress: Callable[[int, int], None] = lambda done, total: None
) -> None:
    """Copy the feed-forwards of a dense model, or the experts of a mixture, into one file, by hidden units.

    What an earlier run left that was killed is removed; so one process at a time writes a file.

    Args:
        path_or_id: a model folder, or a model id.
        out: the file; it appears when it is whole.
        progress: told how many units are done, and how many there are.

    Raises:
        ValueError: if units that are not active are not exactly zero, weights are not stored plainly, or `out` is there
            and no bundle.
    """
    expect_replaceable(out)
    sketch, entries = sketch_of(local_folder(path_or_id), "auto", needs_experts=False)
    expect_plain_weights(sketch.folder, sketch.skeleton, entries, sketch.found)
    for left in out.parent.glob(f".{escape(out.name)}.????????.part"):
        left.unlink()
    write_bundle(out, find_units(sketch, entries, sketch.layers(entries)), progress)
