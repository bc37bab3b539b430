"""What the process needs in memory besides expert slots."""

from dataclasses import replace
from pathlib import Path

import torch

from ..compute.kv_cache import room_positions
from ..compute.resident import expansion_bytes, weight_bytes
from ..memory.budget import Needs, kv_bytes_per_token
from ..ram.expanded import room_bytes
from ..store.store import READ_BYTES
from ..window.planning import WindowPlan
from .activations import activation_bytes
from .opening import OpenedCheckpoint
from .options import LoadOptions
from .pieces import piece_tokens


def memory_needs(opened: OpenedCheckpoint, options: LoadOptions) -> Needs:
    """The parts of a budget that are not expert slots, with `options.context` tokens of KV cache."""
    needs = _with_units(with_window(_needs_of_all(opened, options), opened.window), opened)
    if not opened.left_out:
        return needs
    left = [weight.nbytes for name, weight in opened.model.named_parameters() if name in opened.left_out]
    return replace(needs, weight_bytes=needs.weight_bytes - sum(left), kv_bytes=0)


def _predictor_bytes(options: LoadOptions) -> int:
    """A predictor's file holds its weights as they are in memory."""
    file = Path(options.prefetch)
    return file.stat().st_size if file.suffix == ".npz" and file.is_file() else 0


def with_window(needs: Needs, window: WindowPlan | None) -> Needs:
    """What is needed if some weights are streamed.

    Args:
        needs: with all weights in memory.
        window: what is streamed; None if nothing is.
    """
    if window is None:
        return needs
    return replace(needs, weight_bytes=needs.weight_bytes - window.saved_bytes, window_bytes=window.nbytes)


def _with_units(needs: Needs, opened: OpenedCheckpoint) -> Needs:
    """What is needed if units come one by one."""
    bundle = opened.bundle
    if bundle is None:
        return needs
    # of experts, which no model holds here, nothing is saved
    saved = sum(weight.nbytes for name, weight in opened.model.named_parameters() if name in bundle.weight_names)
    weights, window = needs.weight_bytes - saved, needs.window_bytes + unit_bytes(opened)
    return replace(needs, weight_bytes=weights, window_bytes=window)


def unit_bytes(opened: OpenedCheckpoint) -> int:
    """Memory of a bundle's units: the bounds of their gates, those that stay, and those of one read."""
    if (bundle := opened.bundle) is None:
        return 0
    slots = zip(opened.unit_slots, bundle.layers, strict=False)
    return bundle.bounds_bytes + bundle.work_bytes + sum(count * layer.of.unit_bytes for count, layer in slots)


def _needs_of_all(opened: OpenedCheckpoint, options: LoadOptions) -> Needs:
    config, model = opened.config, opened.model
    dtype: torch.dtype = model.dtype
    tokens = piece_tokens(model, options.context)
    activations = activation_bytes(config, tokens, options.context, opened.top_k, dtype.itemsize)
    expanded, head = expansion_bytes(model, opened.linears)
    return Needs(
        process_bytes=opened.process_bytes,
        weight_bytes=weight_bytes(model) + _predictor_bytes(options),
        kv_bytes=room_positions(options.context) * kv_bytes_per_token(config, dtype.itemsize),
        # a head is expanded where its product is tried, once, when activations of the layers are gone
        activation_bytes=max(activations + expanded, head),
        staging_bytes=options.io_threads * READ_BYTES + room_bytes(opened.forms),
    )
