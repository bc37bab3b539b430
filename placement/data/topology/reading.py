"""Any description of a machine, told by its content."""

from pathlib import Path
from typing import Any

from .described import TopologyOptions, read_text
from .matrix import read_nvidia_smi_topo
from .nccl import read_nccl_topology
from .rocm import read_rocm


def read_topology(path: Path, options: TopologyOptions) -> dict[str, Any]:
    """A mapping that `Cluster.from_mapping` checks; its `guessed` lists what the description does not say.

    Raises:
        ValueError: if the file is no description that is known.
    """
    text = read_text(path)
    if text.lstrip().startswith("<"):
        return read_nccl_topology(path, options)
    if "XGMI" in text or "ROCm" in text:
        return read_rocm(path, text, options).mapping(options)
    return read_nvidia_smi_topo(path, options)
