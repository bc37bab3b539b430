"""Data, tensor and expert parallelism from a mesh of devices and two rules that look at names and shapes only.

1. Experts are split over the axis `expert`: the first axis of everything under `experts`.
2. A matrix is split over the axis `tensor`: along its input if it writes to the residual stream (`o_proj`,
   `down_proj`), else along its output. Between two such matrices nothing needs to be exchanged.

Whatever does not divide, vectors and routers stay whole on every device. Sequences are split over `data` and `expert`.
jax inserts the communication. Source of the idea: Tan et al. 2023 (Redco), arXiv:2310.16355, section 3.1.

Matrices of other people's models have other names, so `partition_by_shape` takes the longer of input and output: layers
that widen are split along their output, and those that narrow again along their input.
"""

from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "expert", "tensor")
WRITES_RESIDUAL = ("o_proj", "down_proj")


def build_mesh(*, data: int = 1, expert: int = 1, tensor: int = 1) -> Mesh:
    """A mesh of the first `data * expert * tensor` devices.

    Raises:
        ValueError: if a size is not positive or there are fewer devices.
    """
    sizes = (data, expert, tensor)
    if min(sizes) < 1:
        raise ValueError(f"mesh axes must be at least 1; got data={data}, expert={expert}, tensor={tensor}")
    needed, devices = int(np.prod(sizes)), jax.devices()
    if needed > len(devices):
        raise ValueError(f"a mesh of {' x '.join(map(str, sizes))} needs {needed} devices; jax sees {len(devices)}")
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices[:needed])


def parse_mesh(text: str) -> Mesh:
    """A mesh from text such as `data=2,expert=4`; axes that are not named have size 1.

    Raises:
        ValueError: if the text does not read so, or there are too few devices.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, _, size = part.strip().partition("=")
        if axis not in AXES or not size.isdecimal() or axis in sizes:
            raise ValueError(f"a mesh reads like data=2,expert=4 with axes {', '.join(AXES)}; got {text!r}")
        sizes[axis] = int(size)
    return build_mesh(**sizes)


def partition(path: tuple[str, ...], shape: tuple[int, ...], mesh: Mesh) -> P:
    """How a parameter is split, by the two rules above.

    Args:
        path: names of the modules that it is in, and its own, outermost first.
        shape: its shape; matrices are [..., input, output].
        mesh: devices along `data`, `expert` and `tensor`.
    """
    axes: list[str | None] = [None] * len(shape)
    if "router" in path or len(shape) < 2:
        return P(*axes)
    if "experts" in path and shape[0] % mesh.shape["expert"] == 0:
        axes[0] = "expert"
    inner = len(shape) - (2 if any(name in WRITES_RESIDUAL for name in path) else 1)
    if axes[inner] is None and shape[inner] % mesh.shape["tensor"] == 0:
        axes[inner] = "tensor"
    return P(*axes)


def partition_by_shape(path: tuple[str, ...], shape: tuple[int, ...], mesh: Mesh) -> P:
    """How a parameter of any model is split; arguments are those of `partition`.

    The longer of the last two axes goes over `tensor`; of two equal ones the output, unless the matrix writes to the
    residual stream. Where the longer one does not divide, the other one is split.
    """
    axes: list[str | None] = [None] * len(shape)
    if "router" in path or len(shape) < 2:
        return P(*axes)
    if "experts" in path and len(shape) > 2 and shape[0] % mesh.shape["expert"] == 0:
        axes[0] = "expert"
    inner, outer = len(shape) - 2, len(shape) - 1
    is_narrowing = shape[inner] > shape[outer]
    is_writing = shape[inner] == shape[outer] and any(name in WRITES_RESIDUAL for name in path)
    for axis in (inner, outer) if is_narrowing or is_writing else (outer, inner):
        if axes[axis] is None and shape[axis] % mesh.shape["tensor"] == 0:
            axes[axis] = "tensor"
            break
    return P(*axes)


def place_examples(batch: Any, mesh: Mesh | None) -> Any:
    """A tree of arrays [B, ...] on its devices, split by example.

    Raises:
        ValueError: if the examples do not divide over the axis `data`.
    """
    if mesh is None:
        return batch
    sizes = {len(leaf) for leaf in jax.tree.leaves(batch)}
    if any(size % mesh.shape["data"] for size in sizes):
        raise ValueError(f"{max(sizes)} examples do not divide over {mesh.shape['data']} devices")
    divides = all(size % (mesh.shape["data"] * mesh.shape["expert"]) == 0 for size in sizes)
    return jax.device_put(batch, NamedSharding(mesh, P(("data", "expert") if divides else "data")))


def place_batch(tokens: np.ndarray, mesh: Mesh | None) -> Array:
    """Tokens [..., B, S] on their devices, split by sequence.

    Raises:
        ValueError: if the sequences do not divide over the axis `data`.
    """
    if mesh is None:
        return jax.numpy.asarray(tokens)
    num_sequences = tokens.shape[-2]
    if num_sequences % mesh.shape["data"]:
        raise ValueError(f"{num_sequences} sequences do not divide over {mesh.shape['data']} devices")
    divides = num_sequences % (mesh.shape["data"] * mesh.shape["expert"]) == 0
    split = P(*[None] * (tokens.ndim - 2), ("data", "expert") if divides else "data")
    return jax.device_put(tokens, NamedSharding(mesh, split))
