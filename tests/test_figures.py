"""Every measured figure of the README and of docs/ equals the one in the record that it comes from.

A marker stands behind a figure, a block at the end of the page says where each marker points; both are HTML comments,
so neither shows:

    It decodes 7.5<!--@plain12--> tokens per second.

    <!-- figures
    plain12 = 2026-11-21_offload-compressed tok_per_s[run=4, limit=12GiB, contestant=ours]
    -->

The right side is arithmetic on numbers and record columns, from left to right (`a[...] / b[...] * 100`). A record is
named once, in front. `column[key=value, ...]` is the one value that the matching rows of result.csv share;
`least column[...]`, `most`, `mean` and `count` take several. `record.json:config.decode` is a value of record.json.
"""

import csv
import json
import operator
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import mean

import pytest

ROOT = Path(__file__).parent.parent
RECORDS = ROOT / "experiments" / "records"
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md") if path.name != "files.md")
PAGES = ["README.md", *PAGES]

# A number is a measured figure if one of these stands behind it (or behind the last number of "1.1 to 1.7 GB/s"),
UNITS = (
    *("tok/s", "tokens/s", "tokens per second", "tokens a second", "GB/s", "MB/s", "TFLOP/s", "GB of", "MB of", "MB"),
    *("ms", "us", "s", "seconds", "minutes", "%", "x", "times", "bits", "nats", "bits per byte"),
)
# if it has three decimals or more, if it is a decimal number in a paragraph that links to a record, or if it stands in
# a table, not in its first column, whose header or whose paragraph above has one of these words.
MEASURED_TABLE = r"tokens per second|tok/s|hit rate|registers per thread|\bload on\b|\bms\b|bits per byte"

# What has such a form and was not measured here, word for word, with the reason.
EXEMPT: dict[str, dict[str, str]] = {}

NUMBER = r"(?<![\w.@/^-])[-+]?\d(?:[\d,]*\d)?(?:\.\d+)?(?![\d\w]|\.\d)"
MARKER = r"<!--@(?P<label>[\w.-]+)-->"


@dataclass(frozen=True)
class Figure:
    """A number as printed, and the label of its marker if it has one."""

    text: str
    label: str | None
    line: int


def blank(pattern: str, text: str, flags: int = 0) -> str:
    """Overwrite what matches by spaces; lines stay."""
    return re.sub(pattern, lambda found: re.sub(r"[^\n]", " ", found.group()), text, flags=flags)


def prose(page: str) -> str:
    """A page without code, link targets and hidden blocks; every other character stays where it was."""
    text = blank(r"^```.*?^```", page, re.DOTALL | re.MULTILINE)
    text = blank(r"^(?: {4}|\t)[^|\n]*$", text, re.MULTILINE)
    text = blank(r"<!--(?!@).*?-->", text, re.DOTALL)
    return blank(r"`[^`\n]+`|\]\([^)]*\)", text)


def figures(page: str, exempt: dict[str, str]) -> Iterator[Figure]:
    """Every measured figure of a page, and every number that has a marker."""
    text = prose(page)
    for phrase in exempt:
        text = blank(re.escape(phrase), text)
    units = "|".join(re.escape(unit) for unit in sorted(UNITS, key=len, reverse=True))
    for block, above in blocks(page, text):
        is_table, begin = block.group().lstrip().startswith("|"), block.start()
        has_record = "experiments/records/" in page[begin : block.end()]
        columns = re.search(MEASURED_TABLE, above + block.group().split("\n")[0]) if is_table else None
        behind = ""
        for number in reversed(list(re.finditer(rf"(?P<number>{NUMBER})\**(?:\s?%)?(?:{MARKER})?", block.group()))):
            after = block.group()[number.end() :]
            with_unit = re.match(rf"[\s(]*(?:{units})(?![\w/])", after) or number.group().rstrip().endswith("%")
            chained = behind and re.fullmatch(r"\s*(?:to|and|or|against|,|;)\s*", after[: len(after) - len(behind)])
            decimals = len(number["number"].partition(".")[2])
            in_cell = columns and block.group()[: number.start()].rsplit("\n", 1)[-1].count("|") > 1
            is_figure = with_unit or chained or decimals >= 3 or (decimals and has_record) or in_cell
            behind = block.group()[number.start() :] if with_unit or chained else ""
            if is_figure or number["label"]:
                line = text.count("\n", 0, begin + number.start()) + 1
                yield Figure(number["number"], number["label"], line)


def blocks(page: str, text: str) -> Iterator[tuple[re.Match[str], str]]:
    """Paragraphs and tables, each with the paragraph above it."""
    above = ""
    for block in re.finditer(r"(?:^[^\n]*\S[^\n]*\n?)+", text, re.MULTILINE):
        yield block, above
        above = page[block.start() : block.end()]


if __name__ == "__main__":
    for name in PAGES:
        page = (ROOT / name).read_text(encoding="utf-8")
        lines = page.split("\n")
        for figure in figures(page, EXEMPT.get(name, {})):
            if not figure.label:
                print(name, figure.line, figure.text, "|", lines[figure.line - 1][:150])
