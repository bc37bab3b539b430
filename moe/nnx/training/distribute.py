"""Placing parameters and what belongs to them on a mesh of devices."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ..model.experts import Experts
from ..parts.mesh import partition

Rule = Callable[[tuple[str, ...], tuple[int, ...], Mesh], PartitionSpec]
"""How a parameter is split, from the names of its path, its shape, and the mesh."""


def distribute(model: nnx.Module, mesh: Mesh) -> None:
    """Place the state of our decoder on a mesh by `mesh.partition`, in place.

    Raises:
        ValueError: if the experts do not divide over the axis `expert`.
    """
    for _, module in nnx.iter_modules(model):
        if isinstance(module, Experts):
            num_experts = module.down_proj.shape[0]
            if num_experts % mesh.shape["expert"]:
                raise ValueError(f"{num_experts} experts do not divide over {mesh.shape['expert']} devices")
            module.mesh = mesh
    state = nnx.to_flat_state(nnx.state(model))
    for path, variable in state:
        names = tuple(map(str, path))
        sharding = NamedSharding(mesh, partition(names, variable.shape, mesh))
        variable[...] = jax.device_put(variable[...], sharding)
    nnx.update(model, nnx.from_flat_state(state))


def distributed_tree(params: Any, mesh: Mesh, rule: Rule) -> Any:
    """Any tree of arrays on a mesh.

    Raises:
        ValueError: if the rule splits an axis that does not divide.
    """

    def placed(path: tuple[Any, ...], leaf: Array) -> Array:
        names = tuple(jax.tree_util.keystr((part,), simple=True) for part in path)
        return jax.device_put(leaf, NamedSharding(mesh, rule(names, leaf.shape, mesh)))

    return jax.tree_util.tree_map_with_path(placed, params)


def on_mesh(moments: Any, mesh: Mesh | None) -> Any:
    """Moments follow their parameters; the counters beside them are put on every device of the mesh."""
    if mesh is None:
        return moments
    whole = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(
        lambda leaf: leaf if isinstance(leaf.sharding, NamedSharding) else jax.device_put(leaf, whole), moments
    )
