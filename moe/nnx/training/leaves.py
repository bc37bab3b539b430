"""Trees of arrays in one safetensors file, by the path of each leaf; bits stay."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import Array
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ..parts.processes import is_writing, whole_array


def named_leaves(tree: Any) -> list[tuple[str, Array]]:
    """Every array of a tree with its path, in the order of the tree."""
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def save_leaves(tree: Any, path: Path) -> None:
    """Write a tree; of several processes all call this together, and the first one writes."""
    arrays = {name: whole_array(leaf) for name, leaf in named_leaves(tree)}
    if is_writing():
        save_file(arrays, path)


def restore_leaves(tree: Any, path: Path) -> Any:
    """What `save_leaves` wrote, as a tree whose arrays are where those of `tree` are.

    Raises:
        ValueError: if names, shapes or dtypes differ.
    """
    try:
        with safe_open(path, framework="np") as file:
            leaves = [_fitting(file.get_tensor(name), leaf) for name, leaf in named_leaves(tree)]
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} does not fit this model: {error}") from error
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def _fitting(array: np.ndarray, like: Array) -> Array:
    if array.shape != like.shape or array.dtype != like.dtype:
        raise ValueError(f"expected {like.dtype} {like.shape}; got {array.dtype} {array.shape}")
    return jax.device_put(array, like.sharding)
