"""Arrays from outside: .npy, .npz, .safetensors and .pt files, without pickled objects."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .opening import MAGIC, binary_kind, bounded


def load_npy(path: Path) -> NDArray[Any]:
    """One array; pickled objects are refused."""
    if (kind := binary_kind(bounded(path))) != MAGIC[b"\x93NUMPY"]:
        raise ValueError(f"{path}: expected a NumPy array (.npy); this is {kind or 'text'}")
    try:
        return np.asarray(np.load(path, allow_pickle=False))
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path}: a damaged NumPy array: {error}") from None


def load_npz(path: Path) -> dict[str, NDArray[Any]]:
    """All arrays of a .npz; pickled objects are refused."""
    if (kind := binary_kind(bounded(path))) != MAGIC[b"PK\x03\x04"]:
        raise ValueError(f"{path}: expected NumPy arrays (.npz); this is {kind or 'text'}")
    try:
        # opened here, since np.load leaves a damaged archive open
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except Exception as error:  # zipfile, zlib and NumPy each have errors of their own for damaged archives
        raise ValueError(f"{path}: not a readable .npz: {type(error).__name__}") from None


def load_safetensors(path: Path) -> dict[str, NDArray[Any]]:
    """All tensors of a .safetensors file; bfloat16 becomes float32."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(bounded(path), framework="numpy") as file:
            return {name: np.asarray(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path}: not a readable safetensors file: {error}") from None
    except TypeError:
        return _through_torch(path)


def _through_torch(path: Path) -> dict[str, NDArray[Any]]:
    """NumPy has no bfloat16; torch reads it."""
    from safetensors.torch import load_file

    return {name: tensor.float().numpy() for name, tensor in load_file(path).items()}


def load_torch(path: Path) -> Any:
    """A .pt file without running code from it; tensors come back as torch tensors.

    Raises:
        ValueError: if it is no torch file, or holds more than tensors and plain values.
    """
    if (kind := binary_kind(bounded(path))) is None:
        raise ValueError(f"{path}: expected a torch file (.pt); this is text")
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # whatever a damaged or hostile file makes torch raise
        raise ValueError(
            f"{path}: expected a torch file (.pt) of tensors and plain values; this is {kind}, "
            "which is damaged or holds other objects"
        ) from None
