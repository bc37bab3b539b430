"""NCCL's and RCCL's topology XML (NCCL_TOPO_DUMP_FILE), and the static files that clouds ship for NCCL_TOPO_FILE.

Elements are functions of devices: one card may be several `<net>` (ports, virtual functions), one GPU of a fused dump
has the same `dev` as one of another host. So devices are counted by their host and PCI address.
"""

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .described import TRAY_GPUS, DescribedNode, TopologyOptions, read_text, tray_note
from .rates import MOST_LINKS, NVLINK_BY_SM, PCIE_5_X16, XGMI_BY_GCN, LinkRate, pcie_bytes_per_s

Element = ElementTree.Element
GPU_CLASSES, NET_CLASSES = ("0x0302", "0x0300"), ("0x0207", "0x0200")
# NVLinks that end in a CPU (POWER9), which are no way to another GPU
CPU_CLASS = "0x068001"
# Cards below this share of the fastest are for management: 10 or 25 Gb/s beside 200 or 400. Storage cards are faster.
LEAST_SHARE = 0.2


def read_nccl_topology(path: Path, options: TopologyOptions | None = None, **settings: Any) -> dict[str, Any]:
    """A cluster mapping from the XML of one node.

    Args:
        path: NCCL_TOPO_DUMP_FILE of NCCL or RCCL, or a cloud's static file.
        options: what is known better; or its fields as keywords, such as `nodes=4`.

    Raises:
        ValueError: if the file is not such XML, defines entities, or has no GPUs.
    """
    chosen = options or TopologyOptions(**settings)
    system = _parsed(path)
    guessed: list[str] = []
    gpus = list(_gpus(path, system))
    if not gpus:
        raise ValueError(f"{path}: no <gpu> and no PCI device of a GPU's class in the topology")
    hosts = len({host for host, _, _ in gpus})
    nvlink, links = _nvlink(path, gpus, guessed)
    is_tray = hosts == 1 and len(gpus) == TRAY_GPUS and links == MOST_LINKS
    cards, rate = _network(system, guessed)
    pcie = [found for _, pci, _ in gpus if pci is not None and (found := _pcie(pci)) is not None]
    if hosts > 1:
        guessed.append(f"nodes: the dump joins {hosts} hosts by NVLink; --nodes counts such domains")
    node = DescribedNode(
        gpus=len(gpus),
        nvlink_bytes_per_s=nvlink,
        cards=cards,
        card_bytes_per_s=rate,
        pcie_bytes_per_s=min(pcie, default=None),
        is_tray=is_tray,
        guessed=tuple(guessed),
    )
    return node.mapping(chosen)


def _parsed(path: Path) -> Element:
    text = read_text(path)
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise ValueError(f"{path}: document types and entities are not read")
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise ValueError(f"{path}: not readable as XML: {error}") from None
    if root.tag == "graphs":
        raise ValueError(
            f"{path}: a graph dump (NCCL_GRAPH_DUMP_FILE), which repeats each GPU in every channel; "
            "the topology is what NCCL_TOPO_DUMP_FILE writes"
        )
    if root.tag != "system":
        raise ValueError(f"{path}: expected a <system> of NCCL_TOPO_DUMP_FILE; got <{root.tag}>")
    return root


def _gpus(path: Path, system: Element) -> Iterator[tuple[str, Element | None, Element | None]]:
    """Host, PCI device and `<gpu>` of every GPU; static files have no `<gpu>`."""
    seen: set[tuple[str, str]] = set()
    for host, pci, gpu in _devices(system, "gpu"):
        address = pci.get("busid", "") if pci is not None else ""
        key = host, address or gpu.get("dev", "")
        if key in seen and address:
            raise ValueError(
                f"{path}: two GPUs at PCI address {address}, as MIG instances have, which exchange nothing by NVLink "
                "or PCIe; switch MIG off, or write the cluster file by hand"
            )
        if key not in seen:
            seen.add(key)
            yield host, pci, gpu
    if not seen:
        addresses: set[tuple[str, str]] = set()
        for host, _, pci in _devices(system, "pci"):
            key = host, pci.get("busid", "")
            if pci.get("class", "").startswith(GPU_CLASSES) and key not in addresses:
                addresses.add(key)
                yield host, pci, None


def _devices(system: Element, tag: str) -> Iterator[tuple[str, Element | None, Element]]:
    """Host, nearest PCI device above, and every element of a tag."""

    def walk(element: Element, host: str, pci: Element | None) -> Iterator[tuple[str, Element | None, Element]]:
        for child in element:
            if child.tag == tag:
                yield host, pci, child
            yield from walk(child, child.get("host_hash", host), child if child.tag == "pci" else pci)

    return walk(system, "", None)


def _nvlink(
    path: Path, gpus: list[tuple[str, Element | None, Element | None]], guessed: list[str]
) -> tuple[float, int]:
    """Bytes per second of all links of one GPU, and how many they are (0: PCIe)."""
    elements = [gpu for _, _, gpu in gpus if gpu is not None]
    counts = [_count(path, gpu) for gpu in elements]
    least = min(counts, default=0)
    if least:
        rate = _link_rate(path, elements[0], guessed)
        if len(gpus) == TRAY_GPUS and least == MOST_LINKS and elements[0].get("sm") is None:
            guessed.append(tray_note())
        return least * rate.bytes_per_s, least
    if len(gpus) > 1:
        what = "NVLink reaches only some GPUs" if any(counts) else "no NVLink is described"
        guessed.append(f"nvlink: {what}; {PCIE_5_X16.source} is a guess; say --nvlink RATE of one GPU")
    pcie = [found for _, pci, _ in gpus if pci is not None and (found := _pcie(pci)) is not None]
    return min(pcie, default=PCIE_5_X16.bytes_per_s), 0


def _count(path: Path, gpu: Element) -> int:
    """NVLinks or XGMI links of a GPU to other GPUs and to switches."""
    links = [link for tag in ("nvlink", "xgmi") for link in gpu.findall(tag) if link.get("tclass") != CPU_CLASS]
    counts = [link.get("count", "0") for link in links]
    if bad := [count for count in counts if not count.isdecimal()]:
        raise ValueError(f"{path}: a link's count must be a whole number; got {bad[0]!r}")
    return sum(map(int, counts))


def _link_rate(path: Path, gpu: Element, guessed: list[str]) -> LinkRate:
    gcn = re.sub(r"^(?:gfx)?", "gfx", gpu.get("gcn", gpu.get("arch", "")).split(":")[0])
    if gpu.find("xgmi") is not None:
        if gcn not in XGMI_BY_GCN:
            raise ValueError(f"{path}: the XGMI rate of {gcn} is not known; there are {', '.join(XGMI_BY_GCN)}")
        return XGMI_BY_GCN[gcn]
    text = gpu.get("sm", "")
    if text and not text.isdecimal():
        raise ValueError(f"{path}: sm must be a compute capability such as 90; got {text!r}")
    sm = int(text) if text else 90
    known = max((known for known in NVLINK_BY_SM if known <= sm), default=min(NVLINK_BY_SM))
    if known != sm or not text:
        guessed.append(
            f"nvlink: links of sm {text or '?'} are taken for those of sm {known}; say --nvlink RATE of one GPU"
        )
    return NVLINK_BY_SM[known]


def _network(system: Element, guessed: list[str]) -> tuple[int | None, float | None]:
    """Cards that carry experts' traffic, and the rate of the slowest of them."""
    rates = list(_card_rates(system, guessed).items())
    if not rates:
        return _static_network(system, guessed)
    fastest = max(rate for _, rate in rates)
    chosen = [rate for _, rate in rates if rate >= LEAST_SHARE * fastest]
    slow = [name for name, rate in rates if rate < LEAST_SHARE * fastest]
    if slow:
        guessed.append(f"nic: {', '.join(slow)} are far slower than the others and are taken for management")
    return len(chosen), min(chosen) if fastest > 0 else None


def _card_rates(system: Element, guessed: list[str]) -> dict[str, float]:
    """Bytes per second of each card by the name of its first function.

    Functions with one guid are one card; a guid of 0, which sockets have, says nothing. Ports of a card add up, virtual
    functions of a port do not, and nothing exceeds the card's PCIe link.
    """
    cards: dict[tuple[str, str], dict[str, float]] = {}
    names: dict[tuple[str, str], str] = {}
    limits: dict[tuple[str, str], float] = {}
    for host, pci, net in _devices(system, "net"):
        guid, name = net.get("guid", ""), net.get("name", net.get("dev", ""))
        key = host, name if not guid.strip("0x") else f"guid {guid}"
        ports = cards.setdefault(key, {})
        port = net.get("port", "")
        ports[port] = max(ports.get(port, 0.0), _speed(net))
        names.setdefault(key, name)
        if pci is not None and (limit := _pcie(pci)) is not None:
            limits[key] = limit
    rates: dict[str, float] = {}
    for key, ports in cards.items():
        summed, single = sum(ports.values()), max(ports.values())
        is_shared = summed > limits.get(key, float("inf"))
        rates[f"{key[0]}{names[key]}"] = single if is_shared else summed
        if len(ports) > 1:
            how = f"{single * 8e-9:g} Gb/s once" if is_shared else "added up"
            guessed.append(f"nic: {names[key]} has {len(ports)} ports, {how}")
    return rates


def _speed(net: Element) -> float:
    """NCCL writes Mbit/s, and -1 or 0 where it does not know."""
    try:
        return max(float(net.get("speed", "0")), 0.0) * 1e6 / 8
    except ValueError:
        return 0.0


def _static_network(system: Element, guessed: list[str]) -> tuple[int | None, float | None]:
    """Cards of a static file, which are PCI devices; no faster than their PCIe links."""
    cards = {
        (host, pci.get("busid", "")): _pcie(pci)
        for host, _, pci in _devices(system, "pci")
        if pci.get("class", "").startswith(NET_CLASSES)
    }
    rates = [rate for rate in cards.values() if rate is not None]
    if not cards:
        return None, None
    if rates:
        guessed.append("nic: the rate is that of the card's PCIe link; say --nic RATE of one card")
    return len(cards), min(rates, default=None)


def _pcie(pci: Element) -> float | None:
    return pcie_bytes_per_s(pci.get("link_speed", ""), pci.get("link_width", ""))
