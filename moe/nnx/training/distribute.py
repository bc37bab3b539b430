"""Placing a model's parameters on a mesh of devices, by the rules of `mesh.partition`."""

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from ..model.experts import Experts
from ..parts.mesh import partition


def distribute(model: nnx.Module, mesh: Mesh) -> None:
    """Place a model's state on a mesh, in place.

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
