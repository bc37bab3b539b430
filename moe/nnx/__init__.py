"""The Flax twin: the same decoder, routers and checkpoints in JAX; the only package that imports jax and flax.

`import moe.nnx` needs the extra `expertier[jax]`. torch is imported to read configs and the router catalogue, and
computes nothing.
"""

from .checkpoint import load_pretrained, save_pretrained
from .decoder import MoEForCausalLM, MoEOutput
from .distribute import distribute
from .experts import Experts, compute_experts
from .grouped import GROUPED_PRODUCTS
from .mesh import build_mesh, parse_mesh

__all__ = [
    "GROUPED_PRODUCTS",
    "Experts",
    "MoEForCausalLM",
    "MoEOutput",
    "build_mesh",
    "compute_experts",
    "distribute",
    "load_pretrained",
    "parse_mesh",
    "save_pretrained",
]
