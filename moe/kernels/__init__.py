"""Experts computed by Triton kernels: training, decode, quantised weights, weights in cache slots.

The only place that imports triton, and imported only when it is used, so that `import moe` works without it.
`README.md` beside this file has the mathematics, the memory that training saves, and the tiling; start reading at
`forward.py`, then `backward.py`; each other file is one operation.
"""

from .experts import activation_of, can_compute, can_compute_in, fused_experts
from .in_parts import FewRows, ManyRows, rows_in_parts
from .operators import ExpertWeights, compute_experts
from .weights.quantise import QuantisedWeight, dequantise, quantise

__all__ = [
    "ExpertWeights",
    "FewRows",
    "ManyRows",
    "QuantisedWeight",
    "activation_of",
    "can_compute",
    "can_compute_in",
    "compute_experts",
    "dequantise",
    "fused_experts",
    "quantise",
    "rows_in_parts",
]
