"""The Flax twin: the same decoder, routers and checkpoints in JAX; the only package that imports jax and flax.

`import moe.nnx` needs the extra `expertier[jax]`. torch is imported to read configs and the router catalogue, and
computes nothing.
"""

from .model.checkpoint import load_pretrained, save_pretrained
from .model.decoder import MoEForCausalLM, MoEOutput
from .model.experts import Experts, compute_experts
from .model.generation import generate
from .parts.grouped import GROUPED_PRODUCTS
from .parts.mesh import build_mesh, parse_mesh
from .training.distribute import distribute
from .training.pipeline import Pipeline

__all__ = [
    "GROUPED_PRODUCTS",
    "Experts",
    "MoEForCausalLM",
    "MoEOutput",
    "Pipeline",
    "build_mesh",
    "compute_experts",
    "distribute",
    "generate",
    "load_pretrained",
    "parse_mesh",
    "save_pretrained",
]
