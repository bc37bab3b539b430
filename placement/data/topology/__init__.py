"""Cluster files from what a machine says about itself: `nvidia-smi topo -m`, `rocm-smi`, NCCL's and RCCL's XML."""

from .described import TopologyOptions
from .matrix import read_nvidia_smi_topo
from .nccl import read_nccl_topology
from .reading import read_topology

__all__ = ["TopologyOptions", "read_nccl_topology", "read_nvidia_smi_topo", "read_topology"]
