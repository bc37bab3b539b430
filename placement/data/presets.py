"""Cluster files of machines that are sold as they are: one NVLink or Infinity Fabric domain is one node.

Rates are of data sheets, per GPU and one direction, dense arithmetic; `efficiency` and the network are guesses.
"""

from typing import Any

from routing.ground.expect import expect_name

# of the data sheet under `source`: `gpu` is of one GPU, arithmetic dense; `dram` is size and rate of a whole node
PRESETS: dict[str, dict[str, Any]] = {
    "hgx-h100": {
        "gpu": {"memory": "80GB", "hbm": "3.35TB/s", "flops": {"fp8": "1979T", "bf16": "989T"}},
        "node": {"gpus": 8, "nvlink": "450GB/s", "pcie": "64GB/s"},
        "source": "NVIDIA H100 SXM data sheet",
    },
    "gb200-nvl72": {
        "gpu": {"memory": "186GB", "hbm": "8TB/s", "flops": {"fp8": "5000T", "bf16": "2500T"}},
        "node": {"gpus": 72, "nvlink": "900GB/s", "pcie": "225GB/s", "dram": ("17TB", "14TB/s")},
        "source": "NVIDIA GB200 NVL72 data sheet; NVLink-C2C 900 GB/s per two GPUs, both directions",
    },
    "gb300": {
        "gpu": {"memory": "279GB", "hbm": "8TB/s", "flops": {"fp8": "5000T", "bf16": "2500T"}},
        "node": {"gpus": 72, "nvlink": "900GB/s", "pcie": "225GB/s", "dram": ("17TB", "14TB/s")},
        "source": "NVIDIA GB300 NVL72 data sheet; NVLink-C2C as in GB200",
    },
    "mi355x": {
        "gpu": {"memory": "288GB", "hbm": "8TB/s", "flops": {"fp8": "5000T", "bf16": "2500T"}},
        "node": {"gpus": 8, "nvlink": "537.6GB/s", "pcie": "64GB/s"},
        "source": "AMD Instinct MI355X data sheet: 7 links of 153.6 GB/s, both directions",
    },
}
NIC = "400Gb/s"  # one card per GPU, as the vendors' reference racks have; a guess for any other


def preset_cluster(
    name: str, nodes: int = 1, *, nvlink_bytes_per_s: float | None = None, nic_bytes_per_s: float | None = None
) -> dict[str, Any]:
    """A cluster mapping of so many domains of a known machine.

    Args:
        name: a key of PRESETS.
        nodes: domains: racks of NVL72, boards of eight.
        nvlink_bytes_per_s, nic_bytes_per_s: of one GPU and of one card, where they are known better.

    Raises:
        ValueError: for an unknown name, or fewer than one node.
    """
    expect_name(name, PRESETS, "preset")
    if nodes < 1:
        raise ValueError(f"a cluster has at least one node; got {nodes}")
    found = PRESETS[name]
    node = found["node"]
    kind: dict[str, Any] = {
        "gpus": {"type": name, "count": node["gpus"]},
        "nvlink": nvlink_bytes_per_s or node["nvlink"],
        "nic": {"count": node["gpus"], "bandwidth": nic_bytes_per_s or NIC},
        "pcie": node["pcie"],
    }
    guessed = [] if nic_bytes_per_s else [f"nic: one card of {NIC} per GPU is a guess; say --nic RATE of one card"]
    if "dram" in node:
        size, rate = node["dram"]
        kind["dram"] = {"size": size, "bandwidth": rate}
        guessed.append("dram: all of it counts for experts; give dram.reserve for what other uses need")
    return {
        "version": 1,
        "gpu_types": {name: found["gpu"]},
        "node_types": {"node": kind},
        "nodes": [{"type": "node", "count": nodes}],
        "guessed": [f"rates: {found['source']}", *guessed],
    }
