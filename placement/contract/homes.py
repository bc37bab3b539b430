"""Homes below the GPUs: which node keeps which expert in host memory or on its SSD, and who computes it there.

Shapes: L layers, E experts, M nodes.
"""

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

Small = NDArray[np.int8]
# codes of both arrays
NONE, COMPUTED, STREAMED = 0, 1, 2
_KEYS = (("host", COMPUTED), ("host_streamed", STREAMED), ("ssd", COMPUTED), ("ssd_streamed", STREAMED))


@dataclass(frozen=True, kw_only=True, eq=False)
class Homes:
    """Copies of experts below the GPUs.

    Args:
        host_LEM: 0 no copy, 1 computed by the node's processors, 2 copied to its GPUs for each use.
        ssd_LEM: the same for copies on SSD, which are read first.

    Raises:
        ValueError: if the shapes differ or a code is unknown.
    """

    host_LEM: Small
    ssd_LEM: Small

    def __post_init__(self) -> None:
        if self.host_LEM.shape != self.ssd_LEM.shape or self.host_LEM.ndim != 3:
            raise ValueError(
                f"homes need [layers, experts, nodes] twice; got {self.host_LEM.shape}, {self.ssd_LEM.shape}"
            )
        for name in ("host_LEM", "ssd_LEM"):
            codes = getattr(self, name)
            if codes.size and (codes.min() < NONE or codes.max() > STREAMED):
                raise ValueError(f"{name} must be 0, 1 or 2; got {codes.min()} to {codes.max()}")

    def to_json(self) -> list[dict[str, Any]]:
        """One entry per node; each lists expert ids of every layer."""
        return [
            {key: [np.flatnonzero(row == code).tolist() for row in self._array(key)[:, :, node]] for key, code in _KEYS}
            for node in range(self.host_LEM.shape[2])
        ]

    def _array(self, key: str) -> Small:
        return self.host_LEM if key.startswith("host") else self.ssd_LEM

    @classmethod
    def from_json(cls, value: Any, shape: tuple[int, int]) -> Self:
        """Inverse of `to_json`; the file may come from outside.

        Args:
            value: one mapping per node.
            shape: L and E of the plan.
        """
        if not isinstance(value, list) or not all(isinstance(node, dict) for node in value):
            raise ValueError("homes must be a list with one mapping per node")
        arrays = {name: np.zeros((*shape, len(value)), np.int8) for name in ("host", "ssd")}
        for node, entry in enumerate(value):
            for key, code in _KEYS:
                layers = entry.get(key, [[]] * shape[0])
                if not isinstance(layers, list) or len(layers) != shape[0]:
                    raise ValueError(f"homes of node {node}: {key} must list experts of {shape[0]} layers")
                for layer, experts in enumerate(layers):
                    ids = np.array(experts, np.float64).reshape(-1)
                    if np.any(ids != np.floor(ids)) or np.any(ids < 0) or np.any(ids >= shape[1]):
                        raise ValueError(f"homes of node {node}: {key} names experts outside 0..{shape[1] - 1}")
                    row_E = arrays[key.partition("_")[0]][layer, :, node]
                    if len(np.unique(ids)) < len(ids) or row_E[ids.astype(np.int64)].any():
                        raise ValueError(f"homes of node {node}: {key} names an expert twice in row {layer}")
                    row_E[ids.astype(np.int64)] = code
        return cls(host_LEM=arrays["host"], ssd_LEM=arrays["ssd"])
