"""Experts computed by Triton kernels: training, decode, quantised weights, weights in cache slots.

The only place that imports triton, and imported only when it is used, so that `import moe` works without it.
`README.md` beside this file has the mathematics, the memory that training saves, and the tiling; start reading at
`forward.py`, then `backward.py`; each other file is one operation.
"""

from .experts import can_compute, fused_experts
from .operators import ExpertWeights, compute_experts
from .quantise import QuantisedWeight, dequantise, quantise

__all__ = [
    "ExpertWeights",
    "QuantisedWeight",
    "can_compute",
    "compute_experts",
    "dequantise",
    "fused_experts",
    "quantise",
]
