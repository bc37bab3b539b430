"""The text of `nvidia-smi topo -m`, if it comes with `nvidia-smi -L` also the GPUs' names."""

import re
from pathlib import Path
from typing import Any

from .described import TRAY_GPUS, DescribedNode, TopologyOptions, read_text, tray_note
from .rates import MOST_LINKS, NVLINK_3_BRIDGE, NVLINK_4, NVLINK_5, NVLINK_BY_NAME, PCIE_5_X16, LinkRate

_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_GPU = re.compile(r"^GPU\d+$")
_CELL = re.compile(r"^(X|SYS|NODE|PHB|PXB|PIX|PSB|SOC|C2C|NV\d+)$")
_NVLINK = re.compile(r"^NV(\d+)$")
Cells = dict[str, dict[str, str]]


def read_nvidia_smi_topo(path: Path, options: TopologyOptions | None = None, **settings: Any) -> dict[str, Any]:
    """A cluster mapping from the saved text of one node.

    Args:
        path: `nvidia-smi topo -m`, best with the lines of `nvidia-smi -L` in the same file.
        options: what is known better; or its fields as keywords, such as `nodes=4`.

    Raises:
        ValueError: if the text has no such matrix, or the GPUs are MIG instances.
    """
    chosen = options or TopologyOptions(**settings)
    text = _ANSI.sub("", read_text(path))
    if re.search(r"^\s*MIG \S+\s+Device", text, re.MULTILINE):
        raise ValueError(
            f"{path}: the GPUs are cut into MIG instances, which exchange nothing by NVLink or PCIe; "
            "switch MIG off, or write the cluster file by hand"
        )
    cells = _cells(path, text)
    return _node(path, text, cells).mapping(chosen)


def _cells(path: Path, text: str) -> Cells:
    """What joins each device to each other, by name."""
    lines = [line.split() for line in text.splitlines()]
    header = next((words for words in lines if words and words[0] == "GPU0" and _is_header(words)), None)
    if header is None:
        raise ValueError(f"{path}: expected the matrix of `nvidia-smi topo -m` with a header GPU0 GPU1 ...")
    stop = next((index for index, word in enumerate(header) if word in ("CPU", "NUMA")), len(header))
    names = header[:stop]
    rows = {
        words[0]: words[1 : len(names) + 1] for words in lines if words and words[0] in names and words is not header
    }
    if missing := [name for name in names if name not in rows or len(rows[name]) < len(names)]:
        raise ValueError(f"{path}: the matrix has no whole row for {missing[0]}; save the output again, unwrapped")
    for name, row in rows.items():
        if bad := [cell for cell in row if not _CELL.match(cell)]:
            raise ValueError(f"{path}: row {name} has {bad[0]!r}; expected X, NV#, PIX, PXB, PHB, NODE or SYS")
    return {name: dict(zip(names, row, strict=True)) for name, row in rows.items()}


def _is_header(words: list[str]) -> bool:
    return not any(_CELL.match(word) for word in words)


def _node(path: Path, text: str, cells: Cells) -> DescribedNode:
    gpus = [name for name in cells if _GPU.match(name)]
    guessed: list[str] = []
    pairs = [[_links(cells[one][other]) for other in gpus if other != one] for one in gpus]
    least = min((min(row) for row in pairs if row), default=0)
    if least:
        summed = min(sum(row) for row in pairs)
        # a pair's links are all of the GPU's links if they go through a switch, and a part of them if not
        total = least if summed > MOST_LINKS else summed
        is_tray = len(gpus) == TRAY_GPUS and least == MOST_LINKS
        nvlink = total * _rate(text, len(gpus), total, is_tray, guessed).bytes_per_s
    else:
        is_tray, nvlink = False, PCIE_5_X16.bytes_per_s
        some = any(any(row) for row in pairs)
        if len(gpus) > 1:
            what = "NVLink joins only some pairs" if some else "no NVLink is described"
            guessed.append(f"nvlink: {what}; {PCIE_5_X16.source} is a guess; say --nvlink RATE of one GPU")
    return DescribedNode(
        gpus=len(gpus),
        nvlink_bytes_per_s=nvlink,
        cards=_cards(cells, gpus, guessed),
        card_bytes_per_s=None,
        is_tray=is_tray,
        guessed=tuple(guessed),
    )


def _links(cell: str) -> int:
    match = _NVLINK.match(cell)
    return int(match[1]) if match else 0


def _rate(text: str, gpus: int, links: int, is_tray: bool, guessed: list[str]) -> LinkRate:
    """One NVLink's rate: by the GPU's name, or guessed by the number of links."""
    names = re.findall(r"^\s*GPU \d+: (.+?)(?: \(UUID|$)", text, re.MULTILINE)
    for name in names[:1]:
        for pattern, rate in NVLINK_BY_NAME:
            if pattern.search(name):
                return rate
    if is_tray:
        guessed.append(tray_note())
        return NVLINK_5
    rate = NVLINK_3_BRIDGE if (gpus, links) == (2, 4) else NVLINK_4
    also = f"; a B200 has as many of {NVLINK_5.bytes_per_s / 1e9:g} GB/s" if links == MOST_LINKS else ""
    guessed.append(
        f"nvlink: the text counts {links} links per GPU and does not say how fast they are; "
        f"{rate.bytes_per_s / 1e9:g} GB/s each is a guess{also}; say --nvlink RATE of one GPU, "
        "or save `nvidia-smi -L` in the same file"
    )
    return rate


def _cards(cells: Cells, gpus: list[str], guessed: list[str]) -> int | None:
    """Network cards that serve the GPUs.

    Ports and virtual functions of one card are PIX to each other. Where some cards share a PCIe switch with a GPU (PIX,
    PXB), the others are for storage and management.
    """
    functions = [name for name in cells if name not in gpus]
    if not functions:
        return None
    cards: list[list[str]] = []
    for name in functions:
        own = next((card for card in cards if cells[card[0]][name] == "PIX"), None)
        if own is None:
            cards.append([name])
        else:
            own.append(name)
    near = [card for card in cards if any(cells[gpu][name] in ("PIX", "PXB") for gpu in gpus for name in card)]
    chosen = near or cards
    if len(functions) > len(cards):
        guessed.append(
            f"nic: {len(functions)} ports and functions are taken for {len(cards)} cards (PIX to each other)"
        )
    if len(chosen) < len(cards):
        away = [card[0] for card in cards if card not in chosen]
        guessed.append(
            f"nic: {', '.join(away)} share no PCIe switch with a GPU and are taken for storage or management"
        )
    return len(chosen)
