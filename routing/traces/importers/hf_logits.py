"""transformers `output_router_logits=True`: raw logits per sparse layer, as .npz or .safetensors.

Arrays are `[tokens, E]`, or `[requests, tokens, E]` for a batch; `attention_mask [requests, tokens]` marks padding.
The experts are the plain top-k of the logits: a router that adds a bias or picks groups first (DeepSeek) chose others.
"""

import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .reading.arrays import load_npz, load_safetensors
from .reading.recording import ImportOptions, LeftOut, Recording, unequal

LAYER = re.compile(r"layers?[._]?(\d+)", re.IGNORECASE)
PLAIN_TOP_K = "experts are the plain top-k of the logits; routers with a bias or groups chose others"
MASK = "attention_mask"


def read_hf_logits(path: Path, options: ImportOptions) -> Recording:
    """Read the logits of all layers; E is their last dimension."""
    if options.top_k is None:
        raise ValueError(f"{path}: router logits do not say how many experts a token uses; give top_k")
    arrays = load_safetensors(path) if path.suffix == ".safetensors" else load_npz(path)
    mask = arrays.pop(MASK, None)
    names = sorted(arrays, key=_order)
    logits_LBSE = _stack(path, [arrays[name] for name in names], options.top_k)
    L, B, S, E = logits_LBSE.shape
    valid_T = _valid(path, mask, B, S)
    chosen = np.argsort(-logits_LBSE, axis=-1, kind="stable")[..., : options.top_k]
    expert_TLK = chosen.transpose(1, 2, 0, 3).reshape(B * S, L, options.top_k)[valid_T]
    sequence_T = np.repeat(np.arange(B), S)[valid_T]
    return Recording(
        expert_TLK=expert_TLK.astype(np.int64),
        sequence_T=sequence_T,
        position_T=_positions(sequence_T),
        layer_ids=_layer_ids(names),
        num_experts=E,
        read={"lines": len(names), "tokens": B * S, "layers": L},
        left_out=(LeftOut(unit="tokens", count=int((~valid_T).sum()), reason="padding by attention_mask"),),
        notes=(PLAIN_TOP_K,),
    )


def _stack(path: Path, layers: list[NDArray[np.generic]], top_k: int) -> NDArray[np.float32]:
    shapes = {layer.shape for layer in layers}
    if not shapes:
        raise ValueError(f"{path}: holds no router logits")
    if len(shapes) != 1:
        raise unequal(str(path), shapes, "the shapes of all layers' logits")
    (shape,) = shapes
    if len(shape) not in (2, 3) or shape[-1] < top_k or 0 in shape:
        raise ValueError(f"{path}: expected logits [tokens, experts >= {top_k}] or a batch of them; got shape {shape}")
    if kinds := {layer.dtype.name for layer in layers if layer.dtype.kind not in "fiu"}:
        raise ValueError(f"{path}: expected logits as numbers; got {', '.join(sorted(kinds))}")
    stacked = np.stack([np.asarray(layer, np.float32).reshape(-1, *shape[-2:]) for layer in layers])
    if not np.isfinite(stacked).all():
        raise ValueError(f"{path}: logits hold NaN or infinities; a router cannot have chosen by them")
    return stacked


def _valid(path: Path, mask: NDArray[np.generic] | None, requests: int, tokens: int) -> NDArray[np.bool_]:
    if mask is None:
        return np.ones(requests * tokens, bool)
    if mask.size != requests * tokens:
        raise ValueError(f"{path}: attention_mask {mask.shape} does not fit {requests} requests of {tokens} tokens")
    return np.asarray(mask.reshape(-1) != 0)


def _positions(sequence_T: NDArray[np.int64]) -> NDArray[np.int64]:
    """Places of rows within their requests, which come one after another."""
    first_T = np.searchsorted(sequence_T, sequence_T)
    return np.arange(len(sequence_T)) - first_T


def _order(name: str) -> tuple[int, str]:
    """Layers in order of their numbers: layer_2 before layer_10."""
    digits = re.findall(r"\d+", name)
    return (int(digits[-1] if LAYER.search(name) is None else LAYER.findall(name)[0]) if digits else 0, name)


def _layer_ids(names: list[str]) -> tuple[int, ...] | None:
    """Decoder layers, if every name has one as `layer_3` or `model.layers.3.mlp.gate`."""
    found = [LAYER.findall(name) for name in names]
    if not all(len(numbers) == 1 for numbers in found):
        return None
    ids = tuple(int(numbers[0]) for numbers in found)
    return ids if len(set(ids)) == len(ids) else None
