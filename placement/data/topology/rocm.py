"""The text of `rocm-smi --showtopo`, if it comes with `rocm-smi --showproductname` also the GPUs' architecture."""

import re
from pathlib import Path

from .described import DescribedNode, TopologyOptions
from .rates import PCIE_5_X16, XGMI_BY_GCN

_GPU = re.compile(r"^GPU\d+$")
_TITLE = re.compile(r"^=+ *(\w[\w ]*?) between two GPUs *=+$")
_GFX = re.compile(r"\bgfx[0-9a-f]+\b")
LINKS = ("XGMI", "PCIE")
Cells = dict[tuple[str, str], str]
"""What a table says of each pair of GPUs."""


def read_rocm(path: Path, text: str, options: TopologyOptions) -> DescribedNode:
    """A node from the tables of its links.

    Args:
        path: names the file in messages.
        text: with the table `Link Type between two GPUs`; the one of hops tells neighbours from others.
        options: the rate of all links of one GPU, where neither table nor architecture says it.

    Raises:
        ValueError: if there is no such table, one is damaged, or no rate is known.
    """
    tables = _tables(path, text)
    kinds = [table for table in tables.values() if any(cell in LINKS for cell in table.values())]
    gpus = sorted({gpu for gpu, _ in next(iter(tables.values()), {})}, key=lambda name: int(name[3:]))
    if not gpus or (len(gpus) > 1 and not kinds):
        raise ValueError(f"{path}: expected the link table of `rocm-smi --showtopo` with rows GPU0, GPU1, ...")
    links: Cells = kinds[0] if kinds else {}
    for (one, other), cell in links.items():
        if one != other and (cell not in LINKS or links[other, one] != cell):
            raise ValueError(f"{path}: {one} to {other} is {cell!r}; expected {' or '.join(LINKS)}, the same both ways")
    guessed: list[str] = []
    rate = options.nvlink_bytes_per_s or _rate(path, text, gpus, links, tables.get("Hops", {}), guessed)
    return DescribedNode(
        gpus=len(gpus), nvlink_bytes_per_s=rate, cards=None, card_bytes_per_s=None, guessed=tuple(guessed)
    )


def _tables(path: Path, text: str) -> dict[str, Cells]:
    """The tables by what they are of: `Weight`, `Hops`, `Link Type`; without a title, by their number."""
    tables: dict[str, Cells] = {}
    title, names = "", list[str]()
    for line in text.splitlines():
        words = line.split()
        if found := _TITLE.match(line.strip()):
            title, names = found[1], []
        elif words and all(map(_GPU.match, words)):
            title, names = title or f"table {len(tables)}", words
            tables[title] = {}
        elif names and words and words[0] in names:
            if len(words) != len(names) + 1:
                raise ValueError(f"{path}: the row of {words[0]} has {len(words) - 1} cells of {len(names)}")
            tables[title] |= {(words[0], other): cell for other, cell in zip(names, words[1:], strict=True)}
        else:
            title, names = "", []
    for title, table in tables.items():
        size = len({other for _, other in table})
        if not table or len(table) != size * size:
            raise ValueError(f"{path}: the table {title} has no whole row for each GPU; save the output again")
    if len({frozenset(table) for table in tables.values()}) > 1:
        raise ValueError(f"{path}: the tables {', '.join(tables)} are of different GPUs")
    return tables


def _rate(path: Path, text: str, gpus: list[str], links: Cells, hops: Cells, guessed: list[str]) -> float:
    """All links of one GPU to the others of its node."""
    near = [sum(links.get((one, other)) == "XGMI" for other in gpus if other != one) for one in gpus]
    if len(gpus) == 1 or min(near) < len(gpus) - 1:
        what = "XGMI joins only some pairs" if any(near) else "no XGMI is described"
        if len(gpus) > 1:
            guessed.append(f"nvlink: {what}; {PCIE_5_X16.source} is a guess; say --nvlink RATE of one GPU")
        return PCIE_5_X16.bytes_per_s
    found = sorted({name for name in _GFX.findall(text) if name in XGMI_BY_GCN})
    if len(found) != 1:
        raise ValueError(
            f"{path}: an AMD link table of {len(gpus)} GPUs, which does not say how fast XGMI is; "
            "say --nvlink RATE, all links of one GPU in one direction (MI300X: 448GB/s), "
            "or save `rocm-smi --showproductname` in the same file"
        )
    link = XGMI_BY_GCN[found[0]]
    direct = min(sum(hops.get((one, other), "1") == "1" for other in gpus if other != one) for one in gpus)
    guessed.append(f"nvlink: one link to each of {direct} neighbours is a guess; {link.source}; say --nvlink RATE")
    return max(direct, 1) * link.bytes_per_s
