"""Cluster files from what a machine says about itself: `nvidia-smi topo -m` and NCCL's topology XML.

Both give a mapping that `Cluster.from_mapping` checks; write it as YAML to edit it.
"""

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

MAX_BYTES = 16 << 20
NVLINK_BYTES_PER_S = {70: 20e9, 80: 25e9, 86: 14e9, 90: 26.5e9, 100: 50e9}  # one link, one direction, by sm
PCIE_BYTES_PER_S = 64e9
_ANSI = re.compile(r"\x1b\[[0-9;]*m")


def read_nvidia_smi_topo(path: Path, *, nodes: int = 1, link_bytes_per_s: float = 25e9) -> dict[str, Any]:
    """The text of `nvidia-smi topo -m` on one node.

    Args:
        path: the saved text.
        nodes: how many such nodes there are.
        link_bytes_per_s: one NVLink, one direction; the text only counts links.

    Raises:
        ValueError: if the text has no GPU rows.
    """
    lines = [_ANSI.sub("", line) for line in _read(path).splitlines()]
    header = next((line.split() for line in lines if line.split()[:1] == ["GPU0"]), None)
    rows = {line.split()[0]: line.split()[1:] for line in lines if re.match(r"^\s*(GPU|NIC)\d+\s", line)}
    gpus = [name for name in rows if name.startswith("GPU")]
    if header is None or not gpus:
        raise ValueError(f"{path}: expected the matrix of `nvidia-smi topo -m` with a header GPU0 GPU1 ...")
    rows = {name: cells for name, cells in rows.items() if len(cells) >= len(gpus)}
    links = [cell for name in gpus for other, cell in zip(gpus, rows.get(name, []), strict=False) if other != name]
    nvlinks = [int(cell[2:]) for cell in links if re.match(r"^NV\d+$", cell)]
    is_complete = len(nvlinks) == len(gpus) * (len(gpus) - 1)
    nvlink = min(nvlinks) * link_bytes_per_s if nvlinks and is_complete else PCIE_BYTES_PER_S
    cards = len({name for name in header if name.startswith(("NIC", "mlx"))})
    return _mapping(len(gpus), nvlink, max(cards, 1), 50e9, nodes)


def read_nccl_topology(path: Path, *, nodes: int = 1) -> dict[str, Any]:
    """NCCL_TOPO_DUMP_FILE of one node.

    Raises:
        ValueError: if the file is not such XML, or defines entities.
    """
    text = _read(path)
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise ValueError(f"{path}: document types and entities are not read")
    try:
        system = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise ValueError(f"{path}: not readable as XML: {error}") from error
    gpus = system.findall(".//gpu")
    if not gpus:
        raise ValueError(f"{path}: no <gpu> in the topology")
    links = [sum(int(link.get("count", "0")) for link in gpu.findall("nvlink")) for gpu in gpus]
    sm = int(gpus[0].get("sm", "90"))
    rate = NVLINK_BYTES_PER_S[max((known for known in NVLINK_BYTES_PER_S if known <= sm), default=70)]
    nvlink = min(links) * rate if min(links) else PCIE_BYTES_PER_S
    cards = {net.get("guid", net.get("name", "")): float(net.get("speed", "0")) for net in system.findall(".//net")}
    nic = min((speed for speed in cards.values() if speed > 0), default=400e3) * 1e6 / 8
    return _mapping(len(gpus), nvlink, max(len(cards), 1), nic, nodes)


def _mapping(gpus: int, nvlink: float, cards: int, nic: float, nodes: int) -> dict[str, Any]:
    node = {"gpus": {"count": gpus}, "nvlink": nvlink, "nic": {"count": cards, "bandwidth": nic}}
    return {"version": 1, "node_types": {"node": node}, "nodes": [{"type": "node", "count": nodes}]}


def _read(path: Path) -> str:
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path}: larger than {MAX_BYTES} bytes")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not readable as text: {error}") from error
