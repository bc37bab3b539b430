"""A node as its description says, and the cluster file of many such nodes; what was guessed stays named in the file."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .rates import NIC_400G, NVLINK_5

# a dump of 72 GPUs with all their switches has less than 1 MiB; larger files are no topology
MAX_BYTES = 16 << 20
# GPUs of a compute tray of GB200 NVL72, and trays of its rack: one NVLink domain of 72 GPUs
TRAY_GPUS, TRAYS = 4, 18


@dataclass(frozen=True, kw_only=True)
class TopologyOptions:
    """What the user knows better than the description.

    Args:
        nodes: how many such nodes there are.
        nvlink_bytes_per_s: all NVLinks of one GPU together, one direction.
        nic_bytes_per_s: one network card, one direction.
        domain_gpus: GPUs that NVLink joins, across nodes too; None guesses.
    """

    nodes: int = 1
    nvlink_bytes_per_s: float | None = None
    nic_bytes_per_s: float | None = None
    domain_gpus: int | None = None

    def __post_init__(self) -> None:
        if self.nodes < 1:
            raise ValueError(f"nodes must be at least 1; got {self.nodes}")


@dataclass(frozen=True, kw_only=True)
class DescribedNode:
    """One node.

    Args:
        gpus: GPUs of the node.
        nvlink_bytes_per_s: what a GPU sends to the others of its node at most.
        cards: network cards, or None if the description names none.
        card_bytes_per_s: one card, or None if the description does not say.
        pcie_bytes_per_s: a GPU's PCIe link, or None.
        is_tray: whether the node looks like a tray of a rack-wide NVLink domain.
        guessed: what is a guess, one sentence each.
    """

    gpus: int
    nvlink_bytes_per_s: float
    cards: int | None
    card_bytes_per_s: float | None
    pcie_bytes_per_s: float | None = None
    is_tray: bool = False
    guessed: tuple[str, ...] = field(default=())

    def mapping(self, options: TopologyOptions) -> dict[str, Any]:
        """The cluster file of `options.nodes` such nodes.

        Raises:
            ValueError: if the nodes do not divide into NVLink domains.
        """
        guessed = [text for text in self.guessed if not text.startswith(_overridden(options))]
        count, rate = self._network(options, guessed)
        per_domain = self._nodes_per_domain(options, guessed)
        groups, types = [], {}
        whole, rest = divmod(options.nodes, per_domain)
        for name, size, number in (("node", per_domain, whole), ("rest", rest, 1)):
            if size and number:
                nic = {"count": count * size, "bandwidth": rate}
                nvlink = options.nvlink_bytes_per_s or self.nvlink_bytes_per_s
                pcie = {} if self.pcie_bytes_per_s is None else {"pcie": self.pcie_bytes_per_s}
                types[name] = {"gpus": {"count": self.gpus * size}, "nvlink": nvlink, "nic": nic, **pcie}
                groups.append({"type": name, "count": number})
        found: dict[str, Any] = {"version": 1, "node_types": types, "nodes": groups}
        return found | ({"guessed": guessed} if guessed else {})

    def _network(self, options: TopologyOptions, guessed: list[str]) -> tuple[int, float]:
        """Cards of one node and the rate of each."""
        count = self.cards
        if count is None:
            count = self.gpus
            guessed.append("nic: no network card is described; one per GPU is a guess")
        rate = options.nic_bytes_per_s or self.card_bytes_per_s
        if rate is None:
            rate = NIC_400G.bytes_per_s
            guessed.append(f"nic: the rate is not described; {NIC_400G.source}; say --nic RATE of one card")
        return count, rate

    def _nodes_per_domain(self, options: TopologyOptions, guessed: list[str]) -> int:
        """Nodes that NVLink joins: in the plan they are one node."""
        if options.domain_gpus is not None:
            nodes, rest = divmod(options.domain_gpus, self.gpus)
            if rest or nodes < 1:
                raise ValueError(
                    f"an NVLink domain of {options.domain_gpus} GPUs is not made of whole nodes of {self.gpus} GPUs"
                )
            return min(nodes, options.nodes)
        if not self.is_tray or options.nodes == 1:
            return 1
        nodes = min(TRAYS, options.nodes)
        guessed.append(
            f"nodes: {TRAYS} trays of {TRAY_GPUS} GPUs are taken for one NVLink domain (GB200 NVL72); "
            "say --nvlink-domain GPUS"
        )
        return nodes


def tray_note() -> str:
    """The guess that a node is a tray; an HGX board of 4 H100 has 6 links per pair, not 18."""
    return (
        f"nvlink: {TRAY_GPUS} GPUs with 18 links per pair are taken for a tray of GB200 NVL72, "
        f"{NVLINK_5.bytes_per_s / 1e9:g} GB/s a link; say --nvlink RATE of one GPU"
    )


def read_text(path: Path) -> str:
    """The description's text.

    Raises:
        ValueError: if it is not there, too large, or not text.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path}: larger than {MAX_BYTES} bytes")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not readable as text: byte {error.start} is not UTF-8") from None


def _overridden(options: TopologyOptions) -> tuple[str, ...]:
    """Beginnings of guesses that an option has settled."""
    return ("nvlink:",) if options.nvlink_bytes_per_s is not None else ()
